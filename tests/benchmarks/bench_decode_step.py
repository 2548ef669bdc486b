"""Where the time of a decode step goes, and what one call for layers with one input (q, k, v; gate, up) would save.

    python tests/benchmarks/bench_decode_step.py [MODEL_DIR] [--group-size 64] [--tokens 40] [--threads 2] [--json FILE]

The blocks of the model are rounded to nearest 4 bits, its head stays as it is. Without MODEL_DIR the model is bench_model's, of
Llama-3.2-1B's shape with random weights. The step is timed without a profiler; torch's profiler then says how the time inside
operators is shared out, and what is left is Python and torch's dispatch. For "one call" the weights of the layers are put one
below the other, which is the best that a joint call could do: calls of the same layers, one by one and joined, take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_linear import machine
from bench_model import float_model, rounded
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import awq_ext
from awq_ext.cli import hf
from awq_ext.modules import output_embeddings

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PROMPT = 16
# operators of torch -> what they do
PARTS = {
    "awq_ext::quant_linear": "int4 layers",
    "aten::mm": "output layer",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
}


@torch.no_grad()
def steps(model: nn.Module, ids: Tensor, count: int) -> list[float]:
    """Seconds of each of ``count`` steps after a prompt."""
    cache, took = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values, []
    for i in range(PROMPT, PROMPT + count):
        start = time.perf_counter()
        cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        took.append(time.perf_counter() - start)
    return took


def shares(model: nn.Module, ids: Tensor, count: int) -> dict[str, float]:
    """Seconds of a step inside operators, by what they do."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        steps(model, ids, count)
    found = dict.fromkeys([*PARTS.values(), "other operators"], 0.0)
    for row in seen.key_averages():
        found[PARTS.get(row.key, "other operators")] += row.self_cpu_time_total * 1e-6 / count
    return found


def joined(layers: list[nn.Linear]) -> nn.Linear:
    """One Linear of several with the same input."""
    one = nn.Linear(
        layers[0].in_features, sum(x.out_features for x in layers), bias=False, dtype=layers[0].weight.dtype
    )
    one.weight.data = torch.cat([x.weight.data for x in layers])
    return one


@torch.no_grad()
def saved(blocks: list[nn.Module], names: tuple[str, ...], group_size: int, rounds: int = 9) -> tuple[float, float]:
    """Seconds of a row through the layers of these names in all blocks, one by one and joined: medians over rounds."""
    parts = [[m for n, m in block.named_modules() if n.rpartition(".")[2] in names] for block in blocks]
    apart = [[rounded(x, group_size, 4) for x in layers] for layers in parts]
    together = [[rounded(joined(layers), group_size, 4)] for layers in parts]
    x = torch.randn(1, 1, parts[0][0].in_features).to(parts[0][0].weight.dtype)

    def run(all_layers: list[list[awq_ext.QuantLinear]]) -> float:
        start = time.perf_counter()
        for layers in all_layers:
            for layer in layers:
                layer(x)
        return time.perf_counter() - start

    took: list[list[float]] = [[], []]
    for _ in range(rounds * 10):
        for times, layers in zip(took, (apart, together), strict=True):
            times.append(run(layers))
    return statistics.median(took[0]), statistics.median(took[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = float_model(16, 128256) if args.model is None else hf.load_model(args.model, "bfloat16")
    blocks, head = list(model.model.layers), output_embeddings(model)
    joint = {" ".join(names): saved(blocks, names, args.group_size) for names in TOGETHER}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]:
        model.set_submodule(name, rounded(linear, args.group_size, 4))
    ids = torch.randint(0, head.out_features, (1, PROMPT + args.tokens))
    steps(model, ids, args.tokens)
    step = min(statistics.median(steps(model, ids, args.tokens)) for _ in range(3))
    parts = shares(model, ids, args.tokens)
    parts["Python and dispatch"] = max(step - sum(parts.values()), 0.0)
    report(step, parts, joint, print)
    if args.json:
        joint_ms = {name: {"apart": 1e3 * a, "joined": 1e3 * b} for name, (a, b) in joint.items()}
        milliseconds = {name: 1e3 * value for name, value in parts.items()}
        data = {"machine": machine(), "step_ms": 1e3 * step, "parts_ms": milliseconds, "one_call_ms": joint_ms}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def report(
    step: float, parts: dict[str, float], joint: dict[str, tuple[float, float]], say: Callable[[str], None]
) -> None:
    """Print all, in milliseconds and as shares of the step."""
    say(f"a decode step: {1e3 * step:.2f} ms")
    for name, value in parts.items():
        say(f"  {name:20s} {1e3 * value:7.2f} ms  {value / step:5.1%}")
    for name, (apart, one) in joint.items():
        gain = f"saves {1e3 * (apart - one):.2f} ms, {(apart - one) / step:.1%} of the step"
        say(f"{name}: {1e3 * apart:.2f} ms in all blocks, joined {1e3 * one:.2f} ms: {gain}")


if __name__ == "__main__":
    main()
