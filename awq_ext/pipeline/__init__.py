"""The pipeline: quantize() and plan(), which lead a model through all storeys below."""
