"""What compute_dtype="int8" costs in accuracy: perplexity of one quantized Hugging Face model computed both ways.

    python tests/benchmarks/bench_int8.py MODEL_DIR --calib calib.txt text/*.txt [--group-size 64] [--json FILE]

The protocol is bench_quality.py's: calibration on --samples windows of --seq tokens, scoring of the first --tokens of each text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bench_quality import perplexity

import awq_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--name", help="what the table calls the model (default: the directory's name)")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokens(path: Path, limit: int) -> torch.Tensor:
        text = path.read_text(encoding="utf-8")[: limit * 24]
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][:limit]

    texts = {path.stem: tokens(path, args.tokens) for path in args.texts}
    calib = tokens(args.calib, args.samples * args.seq).view(args.samples, args.seq).split(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    found: dict[str, dict[str, float]] = {name: {} for name in texts}

    def score(variant: str) -> None:
        for name, ids in texts.items():
            found[name][variant] = perplexity(model, ids, args.seq)
        print(variant, {name: round(values[variant], 3) for name, values in found.items()}, flush=True)

    score("float")
    awq_ext.quantize(model, calib, group_size=args.group_size, progress=False)
    score("auto")
    awq_ext.set_compute_dtype(model, "int8")
    score("int8")
    data = {"model": args.name or Path(args.model).name, "tokens": args.tokens, "group_size": args.group_size}
    if args.json:
        args.json.write_text(json.dumps({**data, "perplexity": found}, indent=1))


if __name__ == "__main__":
    main()
