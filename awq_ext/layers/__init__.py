"""Layers with int4 weights: QuantLinear, its operators, and the quantized weight it is made from."""
