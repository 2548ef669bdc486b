"""Lay out quantized Linears as programs outside of Python have them: llama.cpp, MLX."""
