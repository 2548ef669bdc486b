"""vllm_generate.py FOLDER PROMPT TENSORS: vLLM's CPU backend loads a directory and continues prompts by 16 tokens, greedily.

PROMPT safetensors: tokens int64 [B, T]. TENSORS safetensors: generated int64 [B, T + 16].
"""

from __future__ import annotations

import sys

from vllm_settings import DTYPE  # isort: skip
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams


def main() -> None:
    folder, prompt, out = sys.argv[1:]
    tokens = load_file(prompt)["tokens"]
    engine = LLM(folder, skip_tokenizer_init=True, dtype=DTYPE, enforce_eager=True, max_model_len=128)
    settings = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    rows = tokens.tolist()
    answers = engine.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
    generated = [row + list(answer.outputs[0].token_ids) for row, answer in zip(rows, answers, strict=True)]
    save_file({"generated": torch.tensor(generated)}, out)


if __name__ == "__main__":
    main()
