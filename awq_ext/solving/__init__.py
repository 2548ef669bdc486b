"""One block, from statistics to codes: scales, rounding, error feedback (GPTQ), clips and biases."""
