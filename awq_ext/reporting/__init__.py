"""Reporting: what was done, as values, tables, plots and HTML, and warnings at the caller's line."""
