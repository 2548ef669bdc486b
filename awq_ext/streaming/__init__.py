"""Models larger than memory: weights mapped from files, quantized block by block, results streamed to the disk."""
