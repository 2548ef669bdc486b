"""Perplexity of a Hugging Face causal LM: float, RTN and AWQ, on several kinds of text, and the share of RTN's gap AWQ closes.

    python tests/benchmarks/bench_quality.py MODEL_DIR --calib calib.txt text/*.txt [--group-size 64] [--seq 512] [--json out.json]

MODEL_DIR: a local Transformers directory. Calibration: --samples windows of --seq tokens from the start of --calib. Scoring: the
first --tokens tokens of each text in windows of --seq without overlap; every window predicts its own tokens 2 to the last.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import awq_ext


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor, seq: int, batch: int = 4) -> float:
    """exp of the mean negative log likelihood per predicted token; ids [T]."""
    rows = ids[: len(ids) // seq * seq].view(-1, seq)
    total, count = 0.0, 0
    for chunk in rows.split(batch):
        logits = model(chunk, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
        count += chunk[:, 1:].numel()
    return math.exp(total / count)


def variants(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Name -> overrides of AwqConfig for everything that is compared."""
    common = {"group_size": args.group_size, "bits": args.bits, "packed": args.bits == 4}
    chosen = {"rtn": common | {"method": "rtn"}, "awq": dict(common)}
    for extra in args.variant:
        pairs = dict(pair.split("=") for pair in extra.split(","))
        chosen[extra] = common | {key: literal(value) for key, value in pairs.items()}
    return chosen


def literal(text: str) -> object:
    """A number or a flag where ``text`` is one, otherwise ``text``."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--variant", action="append", default=[], help="more settings, such as method=awq+gptq,clip=False"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokens(path: Path, limit: int) -> torch.Tensor:
        text = path.read_text(encoding="utf-8")[: limit * 24]
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][:limit]

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    calib = tokens(args.calib, args.samples * args.seq).view(args.samples, args.seq).split(1)
    texts = {path.stem: tokens(path, args.tokens) for path in args.texts}
    results: dict[str, dict[str, float]] = {
        "float": {name: perplexity(base, ids, args.seq) for name, ids in texts.items()}
    }
    show("float", results["float"], results)
    seconds = {}
    for name, overrides in variants(args).items():
        model = copy.deepcopy(base)
        start = time.perf_counter()
        awq_ext.quantize(model, calib, progress=False, **overrides)
        seconds[name] = time.perf_counter() - start
        results[name] = {text: perplexity(model, ids, args.seq) for text, ids in texts.items()}
        show(name, results[name], results)
        report = model.awq_report
        ratio = sum(r.loss for r in report.layers if r.loss) / sum(r.loss_rtn for r in report.layers if r.loss_rtn)
        print(f"  {seconds[name]:.1f} s, sum of losses / RTN's {ratio:.4f}; {report.summary()}", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"settings": vars(args), "perplexity": results, "seconds": seconds}, indent=1, default=str)
        )


def show(name: str, row: dict[str, float], results: dict[str, dict[str, float]]) -> None:
    """One line: perplexity on each text, and behind it the share of RTN's gap that is closed."""
    cells, closed = [], []
    for text, value in row.items():
        cell = f"{text} {value:.3f}"
        if "rtn" in results and name != "rtn":
            gap = results["rtn"][text] - results["float"][text]
            closed.append((results["rtn"][text] - value) / gap)
            cell += f" ({closed[-1]:.0%})"
        cells.append(cell)
    mean = f"  mean {sum(closed) / len(closed):.0%}" if closed else ""
    print(f"{name:12s} " + "  ".join(cells) + mean, flush=True)


if __name__ == "__main__":
    main()
