"""Calibration: batches, the weights of their rows, and statistics of what comes to each Linear."""
