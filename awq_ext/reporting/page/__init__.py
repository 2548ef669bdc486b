"""The report as one HTML page: its plots, tables and figures, and what it looks like by day and by night."""
