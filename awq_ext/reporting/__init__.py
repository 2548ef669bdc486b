"""What was done, as values, tables, plots and a page."""
