"""Which weights are better, and how sure that is."""
