"""Evaluation: scores, intervals, methods side by side, and which channels and layers matter."""
