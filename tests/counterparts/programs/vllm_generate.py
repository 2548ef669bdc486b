"""vllm_generate.py FOLDER PROMPT TENSORS: vLLM's CPU backend loads a directory and continues a prompt by 16 tokens, greedily.

PROMPT safetensors: tokens int64 [1, T]. TENSORS safetensors: generated int64 [1, T + 16].
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams


def main() -> None:
    folder, prompt, out = sys.argv[1:]
    tokens = load_file(prompt)["tokens"]
    engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128)
    settings = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": tokens[0].tolist()}], settings, use_tqdm=False)[0]
    generated = torch.tensor([tokens[0].tolist() + list(answer.outputs[0].token_ids)])
    save_file({"generated": generated}, out)


if __name__ == "__main__":
    main()
