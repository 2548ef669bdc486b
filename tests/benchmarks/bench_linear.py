"""Times int4_linear beside torch's Linears and its own int4 kernel, interleaved in one run.

    python tests/benchmarks/bench_linear.py [--shapes 4096x4096,...] [--rows 1,2,...] [--seconds S] [--json FILE]
    python tests/benchmarks/bench_linear.py --render FILE      # Markdown table and plot from such a file

A shape is in_features x out_features. Every contender has so many copies of its weight that none is in a cache when its
turn comes again. One round calls each contender once; a ratio is the median over rounds of peer time / our time, so a
disturbance of the machine that lasts longer than a round hits both sides. Reading a large array is timed in the same
rounds: decoding cannot be faster than that. Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awq_ext import _C, ops, reference

SHAPES = "4096x4096,4096x11008,4096x14336,2048x8192,896x4864,576x1536"
ROWS = "1,2,4,8,16,32,64,128,512"
GROUP = 128
CACHE_BYTES = 256 << 20  # of copies of one weight
READ_BYTES = 32 << 20  # read by one sample of the bandwidth, of an array eight times as long
PEERS = ("fp32", "bf16", "fp16", "aten_int4")
Result = dict[str, Any]


def copies(nbytes: int) -> int:
    return min(96, max(2, -(-CACHE_BYTES // nbytes)))


def turns(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Each call in turn, for ever."""
    endless = itertools.cycle(calls)

    def call() -> object:
        return next(endless)()

    return call


def ours(x: torch.Tensor, n: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    k = x.shape[1]
    group = GROUP if k % GROUP == 0 else 64
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k) / k**0.5, group, scale_dtype=torch.bfloat16)
    packed = _C.pack_int4(codes)

    def layer() -> tuple[torch.Tensor, ...]:  # as a layer makes its buffers
        return _C.tile_int4(packed, k, group), reference.tile_scales(scales), reference.tile_zeros(zeros)

    nbytes = sum(t.nbytes for t in layer())
    x = x.to(dtype)

    def call(own: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: ops.int4_linear(x, *own, None, None, k, n, group)

    return turns([call(layer()) for _ in range(copies(nbytes))]), nbytes


def linear(x: torch.Tensor, n: int, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = x.to(dtype), (torch.randn(n, x.shape[1]) / x.shape[1] ** 0.5).to(dtype)

    def call(own: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.nn.functional.linear(x, own)

    return turns([call(weight.clone()) for _ in range(copies(weight.nbytes))])


def aten_int4(x: torch.Tensor, n: int) -> Callable[[], object]:
    k = x.shape[1]
    group = GROUP if k % GROUP == 0 else 64
    x, codes = x.bfloat16(), torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.randn(k // group, n, 2, dtype=torch.bfloat16)

    def call(own: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, group, scales)

    return turns([call(packed.clone()) for _ in range(copies(packed.nbytes))])


def read_memory() -> Callable[[], object]:
    array = torch.ones(8, READ_BYTES, dtype=torch.uint8)
    return turns([lambda part=part: part.amax() for part in array])  # the fastest reader in torch


def measure(k: int, n: int, rows: int, seconds: float, dtype: torch.dtype) -> Result:
    """Median times in seconds, ratios, bandwidths in bytes a second."""
    x = torch.randn(rows, k)
    own, nbytes = ours(x, n, dtype)
    calls = {"ours": own, "read": read_memory(), "bf16": linear(x, n, torch.bfloat16)}
    if rows <= 8 or dtype != torch.bfloat16:  # beyond, no peer comes near bf16 and one call takes long
        calls |= {"fp32": linear(x, n, torch.float32), "fp16": linear(x, n, torch.float16)}
    if rows <= 32:
        calls["aten_int4"] = aten_int4(x, n)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 7:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    peers = [name for name in PEERS if name in times]
    ratios = {p: statistics.median(a / b for a, b in zip(times[p], times["ours"], strict=True)) for p in peers}
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "in": k,
        "out": n,
        "rows": rows,
        "rounds": len(times["ours"]),
        "times": middle,
        "best": {name: min(values) for name, values in times.items()},
        "ratios": ratios,
        "gflops": 2 * rows * n * k / middle["ours"] / 1e9,
        "bytes_per_second": nbytes / middle["ours"],
        "read_bytes_per_second": READ_BYTES / middle["read"],
    }


def describe(r: Result) -> str:
    share = r["bytes_per_second"] / r["read_bytes_per_second"]
    ratios = "  ".join(f"{peer} {ratio:6.2f}" for peer, ratio in r["ratios"].items())
    return (
        f"{r['in']:5d}x{r['out']:<5d} rows {r['rows']:3d}  {r['times']['ours'] * 1e6:8.0f} us "
        f"(best {r['best']['ours'] * 1e6:8.0f})  {r['gflops']:5.0f} GFLOP/s  {r['bytes_per_second'] / 1e9:5.1f} GB/s = "
        f"{share:4.0%} of read   peer/ours: {ratios}"
    )


def machine() -> Result:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(data: Result) -> str:
    """One line a shape and row count, ratios against the best peer in bold."""
    facts = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
    lines = [f"Measured on: {facts}. Times are medians, ratios medians of interleaved pairs.", ""]
    lines += ["| in x out | rows | ours, us | GFLOP/s | of read bandwidth | bf16 | fp16 | fp32 | aten int4 |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for r in data["results"]:
        closest = min(r["ratios"].values())
        cells = [r["ratios"].get(peer) for peer in ("bf16", "fp16", "fp32", "aten_int4")]
        text = ["" if c is None else f"**{c:.2f}x**" if c == closest else f"{c:.2f}x" for c in cells]
        share = f"{r['bytes_per_second'] / r['read_bytes_per_second']:.0%}" if r["rows"] <= 4 else ""
        start = [f"{r['in']} x {r['out']}", r["rows"], f"{r['times']['ours'] * 1e6:.0f}", f"{r['gflops']:.0f}", share]
        lines.append("| " + " | ".join(str(cell) for cell in [*start, *text]) + " |")
    return "\n".join(lines)


def plot(data: Result, path: Path) -> None:
    """Speed over rows, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["in"], r["out"]) for r in data["results"]))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(3.2 * len(shapes), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (k, n) in zip(axes[0], shapes, strict=True):
        for name in ("ours", *PEERS):
            points = [r for r in data["results"] if (r["in"], r["out"]) == (k, n) and name in r["times"]]
            speed = [2 * r["rows"] * n * k / r["times"][name] / 1e9 for r in points]
            axis.loglog([r["rows"] for r in points], speed, marker="o", label=name)
        axis.set(title=f"{k} x {n}", xlabel="rows", ylabel="GFLOP/s" if k == shapes[0][0] else "")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of our input")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--render", type=Path, help="measure nothing: table and plot (.png beside it) of this file")
    args = parser.parse_args()
    if args.render:
        data = json.loads(args.render.read_text())
        plot(data, args.render.with_suffix(".png"))
        print(table(data))
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = {"machine": machine(), "dtype": args.dtype, "results": []}
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            data["results"].append(measure(k, n, rows, args.seconds, getattr(torch, args.dtype)))
            print(describe(data["results"][-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
