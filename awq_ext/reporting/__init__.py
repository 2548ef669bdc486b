"""Reporting: what was done, as values, tables, plots and a page."""
