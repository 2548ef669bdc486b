"""What the output layer costs as ints: perplexity and KL divergence of a Hugging Face causal LM on several kinds of text.

    python tests/benchmarks/bench_head.py MODEL_DIR --calib calib.txt --traffic code.txt de=multi-de.txt ... [--json FILE]

Two parts. "alone": nothing but the head is quantized, in every way there is, so that its own cost is seen. "whole": the other
layers are quantized by AWQ, the head left float, or in 8 or 4 bits. Calibration: --samples windows of --seq tokens; scoring: the
first --tokens tokens of each text. Without MODEL_DIR and the texts nothing is measured, with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.evaluation.comparison import Comparison
from awq_ext.modules import output_embeddings

BITS = {"int8": 8, "int4": 4}
ALONE = {
    "int8 rtn": ("int8", {"method": "rtn"}),
    "int8 awq": ("int8", {"method": "awq"}),
    "int4 rtn": ("int4", {"method": "rtn"}),
    "int4 awq": ("int4", {"method": "awq"}),
    "int4 awq, fold=always": ("int4", {"method": "awq", "fold": "always"}),
    "int4 gptq": ("int4", {"method": "gptq"}),
    "int4 awq+gptq": ("int4", {"method": "awq+gptq"}),
}


def name_of_head(model: Any) -> str:
    head = output_embeddings(model)
    return next(name for name, module in model.named_modules() if module is head)


def alone(name: str) -> list[dict[str, Any]]:
    """The head by each method, everything else float; per_layer, as head="int8" chooses a method by itself."""
    return [
        {"label": label, "head": head, "only": (name,), **settings, "per_layer": {name: {"method": settings["method"]}}}
        for label, (head, settings) in ALONE.items()
    ]


def whole() -> list[dict[str, Any]]:
    """AWQ with the head in each of its forms."""
    return [{"label": f"head {head}", "method": "awq", "head": head} for head in ("float", "int8", "int4")]


def figures(found: Comparison) -> dict[str, Any]:
    """Values with their intervals; of the head's row in the report the loss and RTN's."""
    return {
        row.label: {
            "bytes": row.size_bytes,
            "seconds": row.seconds,
            "measures": {
                text: {m: [one.value, one.low, one.high] for m, one in e.measures.items()}
                for text, e in row.evaluations.items()
            },
        }
        for row in found.rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, nargs="+", required=True)
    parser.add_argument("--traffic", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    paths = [args.model, *args.calib, *(Path(text.rpartition("=")[2]) for text in args.traffic)]
    if missing := [str(path) for path in paths if not path.exists()]:
        print(f"NOT MEASURED: {', '.join(missing)} does not exist", file=sys.stderr)
        raise SystemExit(2)

    tokenizer, model = hf.load_tokenizer(args.model), hf.load_model(args.model, "auto")
    calib = texts.windows(args.calib, tokenizer, args.samples, args.seq)
    count = -(-args.tokens // args.seq)
    named = hf.named_texts(args.traffic)
    traffic = {name: texts.windows([path], tokenizer, count, args.seq) for name, path in named.items()}
    head = output_embeddings(model)
    data: dict[str, Any] = {
        "model": args.model.absolute().name,
        "head": [head.out_features, head.in_features],
        "settings": {name: getattr(args, name) for name in ("group_size", "samples", "seq", "tokens")},
        "traffic": list(traffic),
    }
    for part, methods in (("whole", whole()), ("alone", alone(name_of_head(model)))):
        found = awq_ext.compare(model, calib, traffic, methods, group_size=args.group_size)
        print(f"\n== {part}")
        print(found, flush=True)
        data[part] = figures(found)
        if args.json:
            args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
