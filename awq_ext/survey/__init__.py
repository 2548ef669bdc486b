"""What one forward shows of a model: its blocks, scale groups and experts, and what stays float."""
