"""Layers with int4 weights: QuantLinear, its operators, and its frozen weight."""
