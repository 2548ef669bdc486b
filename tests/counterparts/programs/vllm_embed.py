"""vllm_embed.py FOLDER TOKENS TENSORS: vLLM's CPU backend makes embeddings of rows of tokens.

TOKENS safetensors: input_ids int64 [B, T]. TENSORS safetensors: embeddings fp32 [B, H].
"""

from __future__ import annotations

import sys

from vllm_settings import DTYPE  # isort: skip
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM


def main() -> None:
    folder, tokens, out = sys.argv[1:]
    engine = LLM(folder, runner="pooling", dtype=DTYPE, enforce_eager=True, max_model_len=64)
    rows = [{"prompt_token_ids": row.tolist()} for row in load_file(tokens)["input_ids"]]
    found = engine.embed(rows, use_tqdm=False)
    save_file({"embeddings": torch.tensor([each.outputs.embedding for each in found]).float()}, out)


if __name__ == "__main__":
    main()
