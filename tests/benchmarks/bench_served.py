"""A quantized directory served by vLLM's CPU build beside awq_ext: how far their greedy continuations are the same.

    python tests/benchmarks/bench_served.py DIR --vllm VLLM_PYTHON --traffic prose.txt code=code.txt ... [--json out.json]

VLLM_PYTHON: FOLDER/vllm/bin/python, which bash tests/counterparts/environments.sh FOLDER vllm makes.
Prompts are the first --prompt tokens of each text; both continue them by 16. Where they part, "lead" says by how much the logit of
awq_ext's token is ahead of that of vLLM's, in awq_ext: near zero, rounding decides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.reporting.tables import Cell, Table

PROGRAM = Path(__file__).parents[1] / "counterparts" / "programs" / "vllm_generate.py"


def served(python: Path, folder: Path, prompts: Tensor) -> Tensor:
    """What vLLM makes of prompts int64 [B, T]: [B, T + 16]."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "AWQ_EXT"))}
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "prompts.safetensors", Path(place) / "found.safetensors"
        save_file({"tokens": prompts}, given)
        command = [str(python), str(PROGRAM), str(folder), str(given), str(found)]
        subprocess.run(command, env=keep | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}, check=True)
        return load_file(found)["generated"]


def parted(model: nn.Module, ours: Tensor, theirs: Tensor, start: int) -> tuple[int, float]:
    """How many tokens of two continuations [T] from ``start`` on are the same, and the lead where they part (0 if nowhere)."""
    same = int((ours[start:] == theirs[start:]).int().cumprod(0).sum())
    if (place := start + same) == len(ours):
        return same, 0.0
    with torch.no_grad():
        logits = model(ours[None, :place]).logits[0, -1].float()
    return same, float(logits[ours[place]] - logits[theirs[place]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--traffic", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer, model = hf.load_tokenizer(args.folder), awq_ext.from_pretrained(args.folder)
    named = hf.named_texts(args.traffic)
    prompts = torch.cat([texts.windows([path], tokenizer, 1, args.prompt)[0] for path in named.values()])
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    ours = torch.cat([model.generate(row[None], **settings) for row in prompts])
    theirs = served(args.vllm, args.folder, prompts)
    rows = []
    for name, one, other in zip(named, ours, theirs, strict=True):
        same, lead = parted(model, one, other, args.prompt)
        rows.append({"text": name, "same": same, "lead": lead})
        for who, tokens in (("awq_ext", one), ("vLLM", other)):
            print(f"{name}, {who}: {tokenizer.decode(tokens[args.prompt :])!r}")
    cells = [[row["text"], f"{row['same']} of 16", f"{row['lead']:.3f}" if row["same"] < 16 else ""] for row in rows]
    print(Table("Greedy tokens", ["text", "the same", "lead"], [list(map(Cell, row)) for row in cells]).to_markdown())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
