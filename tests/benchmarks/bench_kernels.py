"""Times the kernels beside what torch alone offers for the same job, interleaved in one run, and prints the ratio.

    python tests/benchmarks/bench_kernels.py [--only stats,gptq] [--shape NxK | --small] [--repeat N] [--threads N] [--json FILE]

The shapes are those of one block of a Llama with hidden size 2048: (out_features, in_features) of each group of Linears
that share an input. `total` adds them up as one block's quantization does. Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awq_ext import _C
from awq_ext.kernels import reference

SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
CALIBRATION_ROWS, BATCH_ROWS, GROUP = 4096, 512, 128
Row = dict[str, Any]


def interleaved(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Best seconds of each function over `repeat` rounds, one of each a round: a busy machine hits all alike."""
    # One thread is timed by its processor time, which other processes on the machine hardly disturb.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeat):
        for name, function in functions.items():
            start = clock()
            function()
            best[name] = min(best[name], clock() - start)
    return best


def row(name: str, times: dict[str, float], flops: float = 0.0) -> Row:
    result: Row = {"name": name, **times}
    text = f"{name:28s}" + "".join(f"  {key} {seconds * 1e3:9.2f} ms" for key, seconds in times.items())
    if "torch" in times:
        result["torch_over_ours"] = times["torch"] / times["ours"]
        text += f"  torch/ours {result['torch_over_ours']:6.2f}"
    if flops:
        result["gflops"] = flops / times["ours"] / 1e9
        text += f"  {result['gflops']:7.0f} GFLOP/s"
    print(text, flush=True)
    return result


def moment(k: int) -> torch.Tensor:
    x = torch.randn(256, k) * torch.rand(k).add(0.1)
    return x.T @ x + torch.eye(k)


def bench_stats(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    batches = [torch.randn(BATCH_ROWS, k).bfloat16() for _ in range(CALIBRATION_ROWS // BATCH_ROWS)]
    peer = torch.zeros(k, k)

    def ours() -> None:
        stats = _C.ActivationStats(k)
        for x in batches:
            stats.update(x)
        stats.second_moment()

    def torch_alone() -> None:
        for x in batches:
            x32 = x.float()
            peer.addmm_(x32.T, x32)
            x32.double().abs().sum(0)

    return interleaved({"ours": ours, "torch": torch_alone}, repeat), CALIBRATION_ROWS * k * k


def bench_quadratic(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    error, g = torch.randn(n, k), moment(k)
    functions = {
        "ours": lambda: _C.quadratic_loss(error, g),
        "torch": lambda: ((error @ g) * error).double().sum(1),
    }
    return interleaved(functions, repeat), n * k * k


def bench_losses(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g = torch.randn(n, k).bfloat16(), moment(k)
    codes, scales, zeros = _C.quantize_weight(weight, GROUP)
    packed = _C.pack_int4(codes)

    def torch_alone() -> torch.Tensor:
        error = ((codes.float() - zeros.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1)) - weight
        return ((error @ g) * error).double().sum(1)

    functions = {"ours": lambda: _C.code_losses(weight, packed, scales, zeros, g, GROUP), "torch": torch_alone}
    return interleaved(functions, repeat), n * k * k


def bench_scales(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g, candidates = torch.randn(n, k).bfloat16(), moment(k), torch.rand(41, k) + 0.5
    error = torch.randn(512, k)

    def torch_product_only() -> None:  # a lower bound for torch: the products of 41 candidates without the rounding
        for _ in range(41):
            ((error @ g) * error).sum(1)

    functions = {
        "ours": lambda: _C.scale_losses(weight, candidates, g, GROUP, max_rows=512),
        "torch": torch_product_only,
    }
    return interleaved(functions, repeat), 41 * 512 * k * k


def bench_clip(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g, ratios = torch.randn(n, k).bfloat16(), moment(k), torch.linspace(1, 0.5, 11)
    functions = {"ours": lambda: _C.search_clip(weight, g, ratios, GROUP)}
    return interleaved(functions, repeat), 11 * n * k * GROUP


def bench_quantize(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, s = torch.randn(n, k).bfloat16(), torch.rand(k) + 0.5
    functions = {"ours": lambda: _C.pack_int4(_C.quantize_weight(weight, GROUP, channel_scale=s)[0])}
    if n * k <= SHAPES["qkv"][0] * SHAPES["qkv"][1]:
        functions["torch"] = lambda: reference.pack_int4(reference.quantize_weight(weight, GROUP, channel_scale=s)[0])
    return interleaved(functions, repeat), 0.0


def torch_gptq(weight: torch.Tensor, g: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """GPTQ as it is usually written: the Cholesky factor of the inverse, 128 columns at a time, the rest by a product."""
    k, block = weight.shape[1], 128
    _, scales, zeros = reference.quantize_weight(weight, GROUP)
    step, zero = (reference.expand_groups(part.float(), k, GROUP)[:, order].T.contiguous() for part in (scales, zeros))
    w, h = weight.float()[:, order].T.contiguous(), g[order][:, order]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for start in range(0, k, block):
        end = min(k, start + block)
        errors = torch.empty(end - start, w.shape[1])
        for j in range(start, end):
            codes[j] = (torch.round(w[j] / step[j]) + zero[j]).clamp_(0, 15)
            errors[j - start] = (w[j] - (codes[j] - zero[j]) * step[j]) / inverse[j, j]
            w[j + 1 : end].addr_(inverse[j, j + 1 : end], errors[j - start], alpha=-1)
        w[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return codes.T[:, order.argsort()].byte()


def bench_gptq(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g = torch.randn(n, k).bfloat16(), moment(k)
    order = g.diagonal().argsort(descending=True)
    functions = {
        "ours": lambda: _C.gptq_quantize(weight, _C.gptq_factor(g, order), order, GROUP),
        "torch": lambda: torch_gptq(weight, g, order),
    }
    return interleaved(functions, min(repeat, 2)), n * k * k + k**3 / 3


def bench_refine(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g = torch.randn(n, k).bfloat16(), moment(k)
    parts = _C.quantize_weight(weight, GROUP)
    error, row = torch.randn(n, k), torch.randn(k)

    def torch_products_only() -> None:  # a lower bound for torch: one pass over the scales, one over the codes
        for start in range(0, k, GROUP):
            error @ g[:, start : start + GROUP]
        for _ in range(k):
            error @ row

    functions = {"ours": lambda: _C.refine_quantized(weight, *parts, g, GROUP), "torch": torch_products_only}
    return interleaved(functions, min(repeat, 2)), 4 * n * k * k


def bench_fit(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    weight, g = torch.randn(n, k).bfloat16(), moment(k)
    parts = _C.quantize_weight(weight, GROUP)
    error, level = torch.randn(n, k), torch.randn(n, k)

    def torch_products_only() -> None:  # a lower bound for torch: the two products that each group's step takes
        for start in range(0, k, GROUP):
            part = slice(start, start + GROUP)
            error @ g[:, part]
            level[:, part] @ g[part, part]

    functions = {
        "ours": lambda: _C.refine_quantized(weight, *parts, g, GROUP, scales_only=True),
        "torch": torch_products_only,
    }
    return interleaved(functions, repeat), 2 * n * k * k


def bench_scale_gradient(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    gradient, x = torch.randn(BATCH_ROWS, n).bfloat16(), torch.randn(BATCH_ROWS, k).bfloat16()
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k), GROUP)
    tiles = _C.tile_codes(_C.pack_int4(codes), k, GROUP, 4)
    parts = (tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, 4))
    integers = (codes.float() - zeros.repeat_interleave(GROUP, 1)).bfloat16()

    def torch_alone() -> torch.Tensor:  # with the gradient of the whole weight
        return ((gradient.T @ x) * integers).view(n, -1, GROUP).float().sum(-1)

    functions = {
        "ours": lambda: torch.ops.awq_ext.quant_scale_gradient(gradient, x, *parts, None, k, n, GROUP, 4),
        "torch": torch_alone,
    }
    return interleaved(functions, repeat), 2 * BATCH_ROWS * n * k


def bench_learned(n: int, k: int, repeat: int) -> tuple[dict[str, float], float]:
    groups = -(-k // GROUP)
    start, gradient = torch.rand(n, k) * 15, torch.randn(n, k).bfloat16()
    scales, zeros, channel_scale = torch.rand(n, groups), torch.rand(n, groups).mul(15).round(), torch.rand(k) + 0.5

    def both_of(kernels: Any) -> Callable[[], None]:  # a step: the weight, and the move by its gradient
        moved, thetas = torch.zeros(n, k), torch.zeros(n, groups)

        def step() -> None:
            kernels.learned_weight(start, moved, scales, zeros, GROUP, 4, torch.bfloat16, channel_scale)
            kernels.move_learned(start, moved, thetas, scales, zeros, gradient, 1e-6, 1e-6, GROUP, 4, channel_scale)

        return step

    return interleaved({"ours": both_of(_C), "torch": both_of(reference)}, repeat), 10 * n * k


KERNELS = {
    "stats": bench_stats,
    "quadratic": bench_quadratic,
    "losses": bench_losses,
    "scales": bench_scales,
    "clip": bench_clip,
    "quantize": bench_quantize,
    "gptq": bench_gptq,
    "refine": bench_refine,
    "fit": bench_fit,
    "scale_gradient": bench_scale_gradient,
    "learned": bench_learned,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", default=",".join(KERNELS), help="comma-separated part of the list")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", help="one shape of your own instead, such as 4096x4096")
    parser.add_argument("--small", action="store_true", help="a quarter of each dimension")
    args = parser.parse_args()
    shapes = {name: (n // 4, k // 4) if args.small else (n, k) for name, (n, k) in SHAPES.items()}
    if args.shape:
        n, k = map(int, args.shape.split("x"))
        shapes = {"": (n, k)}
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{_C.isa()}, {args.threads} threads, torch {torch.__version__}")
    results = []
    for kernel in (name for name in args.only.split(",") if name in KERNELS):
        total = 0.0
        for name, (n, k) in shapes.items():
            times, flops = KERNELS[kernel](n, k, args.repeat)
            results.append(row(f"{kernel} {name} {n}x{k}", times, flops))
            total += times["ours"]
        results.append(row(f"{kernel} total", {"ours": total}))
    if args.json:
        facts = {"isa": _C.isa(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**facts, "results": results}, indent=2))


if __name__ == "__main__":
    main()
