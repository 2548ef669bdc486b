"""What quantizing cost and gained: scores with intervals, methods side by side, channels and layers that matter."""
