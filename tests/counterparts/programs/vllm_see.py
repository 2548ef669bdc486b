"""vllm_see.py FOLDER PICTURE TOKENS TENSORS: vLLM's CPU backend continues a prompt with a picture by 8 tokens, greedily.

TOKENS safetensors: tokens int64 [1, T], with one token for the picture. TENSORS safetensors: generated int64 [1, 8].
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams


def main() -> None:
    folder, picture, tokens, out = sys.argv[1:]
    engine = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=64, limit_mm_per_prompt={"image": 1})
    settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompt = {
        "prompt_token_ids": load_file(tokens)["tokens"][0].tolist(),
        "multi_modal_data": {"image": Image.open(picture)},
    }
    answer = engine.generate([prompt], settings, use_tqdm=False)[0]
    save_file({"generated": torch.tensor([list(answer.outputs[0].token_ids)])}, out)


if __name__ == "__main__":
    main()
