"""Work directories: what a long quantization has finished, on disk, so that the same call goes on from there."""
