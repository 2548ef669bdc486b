"""What the programs that run vLLM's CPU backend have in common; to be imported before vllm."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
import torch

# With AMX and bfloat16 vLLM rounds activations to 8 bits. What a directory holds is compared, the same on every processor.
DTYPE = os.environ.get("VLLM_DTYPE") or ("float16" if torch.cpu._is_amx_tile_supported() else "bfloat16")
