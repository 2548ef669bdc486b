"""Layers with weights of 4 or 8 bits: QuantLinear, its operators, and the quantized weight it is made from."""
