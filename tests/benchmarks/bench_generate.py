"""Tokens per second of a Hugging Face causal LM: bfloat16 Linears, int4 layers, int4 layers computing in int8, interleaved.

    python tests/benchmarks/bench_generate.py MODEL_DIR [--group-size 64] [--prompt 512] [--new 32] [--json FILE]

Prefill: one forward of --prompt tokens. Decode: --new forwards of one token each after a prompt of 16, with the model's cache,
always the same tokens. Weights are rounded (method="rtn"): speed does not depend on their values. One round runs every
variant once; a ratio is the median over rounds of bf16 time / its time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_linear import machine, priority
from torch import nn

import awq_ext


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds a token."""
    start = time.perf_counter()
    model(ids, use_cache=False, logits_to_keep=1)
    return (time.perf_counter() - start) / ids.shape[1]


@torch.no_grad()
def decode(model: nn.Module, ids: torch.Tensor, new: int) -> float:
    """Seconds a token."""
    cache = model(ids[:, :16], use_cache=True, logits_to_keep=1).past_key_values
    start = time.perf_counter()
    for i in range(16, 16 + new):
        cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - start) / new


def compare(function: Callable[[nn.Module], float], models: dict[str, nn.Module], seconds: float) -> dict[str, object]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        function(model)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["bf16"]) < 5:
        for name, model in models.items():
            times[name].append(function(model))
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = {n: statistics.median(a / b for a, b in zip(times["bf16"], times[n], strict=True)) for n in models}
    return {
        "tokens_per_second": {n: 1 / t for n, t in middle.items()},
        "ratios": ratios,
        "rounds": len(times["bf16"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="what the table calls it (default: the directory's name)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each of prefill and decode")
    parser.add_argument("--realtime", action="store_true", help="before all other processes while timing (Linux, root)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (1, max(args.prompt, 16 + args.new)))
    int4 = awq_ext.quantize(
        copy.deepcopy(base), [ids[:, :16]], method="rtn", group_size=args.group_size, progress=False
    )
    # the same weights, another way to compute
    models = {"bf16": base, "int4": int4, "int8": awq_ext.set_compute_dtype(copy.deepcopy(int4), "int8")}
    data: dict[str, object] = {
        "machine": machine(),
        "model": args.name or Path(args.model).name,
        "group_size": args.group_size,
        "prompt": args.prompt,
        "variants": list(models),
    }
    prefill(base, ids)  # every thread exists when priorities are set
    with priority(args.realtime):
        data["decode"] = compare(lambda m: decode(m, ids, args.new), models, args.seconds)
        data["prefill"] = compare(lambda m: prefill(m, ids[:, : args.prompt]), models, args.seconds)
    print(json.dumps(data, indent=1))
    if args.json:
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
