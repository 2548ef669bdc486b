"""What was done, as values, tables, plots and a page; and warnings at the line of the caller."""
