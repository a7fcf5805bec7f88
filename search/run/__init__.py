"""Ray as the executor of a study, and what a launch shows."""
