"""Solving a block: scales, codes, error feedback, clips and biases from its statistics."""
