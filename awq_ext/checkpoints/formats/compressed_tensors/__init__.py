"""compressed-tensors, which llm-compressor writes and vLLM reads: weights alone, or 8-bit ones with rounded activations."""

from .tensors import CompressedTensors, CompressedTensorsW8A8

__all__ = ["CompressedTensors", "CompressedTensorsW8A8"]
