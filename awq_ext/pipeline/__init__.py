"""quantize() and plan(): a model led through all storeys below, block by block."""
