"""What the output layer costs as ints: perplexity and KL divergence of a Hugging Face causal LM on several kinds of text.

    python tests/benchmarks/bench_head.py MODEL_DIR --calib calib.txt --traffic code.txt de=multi-de.txt ... [--json FILE]

The head is quantized by itself, on the hidden states that the float model gives it for the calibration text, in every way there
is. Each then follows the float model's blocks (its cost alone) and blocks that AWQ quantized (its cost on top of theirs). Only the
heads differ, so the hidden states of each text are computed once. Error feedback here has neither random tokens nor the model's
own text, and weighs all rows alike. Calibration: --samples windows of --seq tokens; scoring: the first --tokens tokens of each
text. Without MODEL_DIR and the texts nothing is measured, with exit code 2.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.modules import output_embeddings

HEADS: dict[str, dict[str, Any]] = {
    "int8": {"head": "int8"},
    "int8 awq": {"head": "int8", "per_layer": {"lm_head": {"method": "awq"}}},
    "int4 rtn": {"head": "int4", "method": "rtn"},
    "int4": {"head": "int4"},
    'int4, fold="always"': {"head": "int4", "fold": "always"},
    "int4 gptq": {"head": "int4", "method": "gptq", "objective": "layer"},
    "int4 awq+gptq": {"head": "int4", "method": "awq+gptq", "objective": "layer"},
}

Scores = dict[str, dict[str, float]]


class Head(nn.Module):
    """The output layer as a model of its own, [T, K] to [T, V]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.lm_head = copy.deepcopy(linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


@torch.no_grad()
def hidden_states(model: nn.Module, windows: list[Tensor]) -> list[Tensor]:
    """What the head reads, [T, K] of each window."""
    seen: list[Tensor] = []
    hook = output_embeddings(model).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for window in windows:
        model(window, use_cache=False)
    hook.remove()
    return seen


@torch.no_grad()
def scores(heads: dict[str, nn.Module], hidden: list[Tensor], reference: list[Tensor], windows: list[Tensor]) -> Scores:
    """Perplexity of each head, and mean KL divergence from the float model, which reads ``reference``; of tokens 2 to the last."""
    sums = {label: [0.0, 0.0] for label in heads}
    count = sum(len(x) - 1 for x in hidden)
    for x, y, ids in zip(hidden, reference, windows, strict=True):
        theirs = F.log_softmax(heads["float"](y[:-1]).float(), -1)
        for label, head in heads.items():
            ours = F.log_softmax(head(x[:-1]).float(), -1)
            sums[label][0] += F.nll_loss(ours, ids[0, 1:], reduction="sum").item()
            sums[label][1] += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    return {
        label: {"perplexity": math.exp(loss / count), "kl": divergence / count}
        for label, (loss, divergence) in sums.items()
    }


def quantized(
    linear: nn.Linear, calib: list[Tensor], settings: dict[str, Any], group_size: int
) -> tuple[nn.Module, dict]:
    """One head, and what the report and the clock say of it."""
    start = time.perf_counter()
    model = awq_ext.quantize(Head(linear), calib, group_size=group_size, progress=False, **settings)
    row = model.awq_report["lm_head"]
    facts = {"seconds": time.perf_counter() - start, "bytes": model.lm_head.nbytes}
    return model, facts | {"loss": row.loss, "loss_rtn": row.loss_rtn}


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
    named = hf.named_texts(args.traffic)
    traffic = {n: texts.windows([path], tokenizer, -(-args.tokens // args.seq), args.seq) for n, path in named.items()}
    linear = output_embeddings(model)
    read = hidden_states(model, calib)
    heads, facts = {"float": Head(linear)}, {"float": {"bytes": linear.weight.nbytes}}
    for label, settings in HEADS.items():
        heads[label], facts[label] = quantized(linear, read, settings, args.group_size)
        print(label, facts[label], flush=True)
    data: dict[str, Any] = {
        "model": args.model.absolute().name,
        "head": [linear.out_features, linear.in_features],
        "settings": {name: getattr(args, name) for name in ("group_size", "samples", "seq", "tokens")},
        "heads": facts,
        "blocks": {},
    }
    plain = {name: hidden_states(model, windows) for name, windows in traffic.items()}
    for blocks in ("float", "awq"):
        if blocks == "awq":
            awq_ext.quantize(model, calib, group_size=args.group_size, progress=False)
        found: dict[str, Scores] = {label: {} for label in heads}
        for name, windows in traffic.items():
            seen = plain[name] if blocks == "float" else hidden_states(model, windows)
            for label, row in scores(heads, seen, plain[name], windows).items():
                found[label][name] = row
                print(blocks, label, name, row, flush=True)
        data["blocks"][blocks] = found
        if args.json:  # after each, so that an interrupt loses nothing that was measured
            args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
