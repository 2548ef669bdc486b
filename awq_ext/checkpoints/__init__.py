"""Checkpoints: directories of quantized models, read, written and converted."""
