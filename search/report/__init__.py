"""What people see of a study: notes, plots, reports, the dashboard. No torch."""
