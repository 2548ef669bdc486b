"""Directories of quantized models: read, written and converted."""
