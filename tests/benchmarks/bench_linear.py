"""Times quant_linear beside torch's Linears and its own int4 kernel, interleaved in one run.

    python tests/benchmarks/bench_linear.py [--shapes 4096x4096,...] [--rows 1,2,...] [--bits 4|8] [--seconds S] [--json FILE]

A shape is in_features x out_features. Every contender has so many copies of its weight that none is in a cache when its
turn comes again. One round gives each contender a turn of about two milliseconds, call after call on one copy after the
other, as a model calls its layers; a ratio is the median over rounds of peer time / our time, so a disturbance of the
machine that lasts longer than a round hits both sides. Reading a large array is timed in the same rounds: decoding cannot
be faster than that. --json adds to the file, replacing the lines measured again; tables.py makes the documents'
tables and the plot from it. Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from awq_ext import _C
from awq_ext.evaluation.processor import this_processor
from awq_ext.kernels import reference
from awq_ext.layers import ops

SHAPES = "4096x4096,4096x11008,4096x14336,2048x8192,896x4864,576x1536"
ROWS = "1,2,4,8,16,32,64,128,512"
CACHE_BYTES = 256 << 20  # of copies of one weight
TURN_SECONDS = 2e-3
READ_BYTES = 32 << 20  # read by one sample of the bandwidth, of eight times as much
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


def ours(
    x: torch.Tensor, n: int, group: int, dtype: torch.dtype, compute_dtype: str = "auto", bits: int = 4
) -> tuple[Callable[[], object], int]:
    k = x.shape[1]
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k) / k**0.5, group, bits, scale_dtype=torch.bfloat16)
    rows = _C.pack_int4(codes) if bits == 4 else codes

    def layer() -> tuple[torch.Tensor, ...]:  # as a layer makes its buffers
        tiles = _C.tile_codes(rows, k, group, bits)
        return tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)

    nbytes = sum(t.nbytes for t in layer())
    x = x.to(dtype)

    def call(own: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: ops.quant_linear(x, *own, None, None, k, n, group, bits, compute_dtype)

    return turns([call(layer()) for _ in range(copies(nbytes))]), nbytes


def linear(x: torch.Tensor, n: int, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = x.to(dtype), (torch.randn(n, x.shape[1]) / x.shape[1] ** 0.5).to(dtype)

    def call(own: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.nn.functional.linear(x, own)

    return turns([call(weight.clone()) for _ in range(copies(weight.nbytes))])


def aten_int4(x: torch.Tensor, n: int, group: int) -> Callable[[], object]:
    k = x.shape[1]
    x, codes = x.bfloat16(), torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.randn(k // group, n, 2, dtype=torch.bfloat16)

    def call(own: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, group, scales)

    return turns([call(packed.clone()) for _ in range(copies(packed.nbytes))])


def read_memory() -> Callable[[], object]:
    """The fastest reader in torch, of memory in large pages, as our weights have it."""
    codes = torch.zeros(READ_BYTES // 4096, 4096, dtype=torch.uint8)
    parts = [_C.tile_codes(codes, 8192, 128, 4).view(torch.float32) for _ in range(8)]
    return turns([lambda part=part: part.sum() for part in parts])


def contenders(
    k: int, n: int, rows: int, group: int, dtype: torch.dtype, bits: int
) -> tuple[dict[str, Callable[[], object]], int]:
    """Name -> call, and the bytes of our weight."""
    x = torch.randn(rows, k)
    own, nbytes = ours(x, n, group, dtype, bits=bits)
    calls = {"ours": own, "int8": ours(x, n, group, dtype, "int8", bits)[0]}
    calls |= {"read": read_memory(), "bf16": linear(x, n, torch.bfloat16)}
    if rows <= 8 or dtype != torch.bfloat16:  # beyond, no peer comes near bf16 and one call takes long
        calls |= {"fp32": linear(x, n, torch.float32), "fp16": linear(x, n, torch.float16)}
    if rows <= 32:
        calls["aten_int4"] = aten_int4(x, n, group)
    return calls, nbytes


def turn(call: Callable[[], object], count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds a call."""
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def rounds(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    settle: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call in every round, of each contender. Before a turn counts, calls of its own fill ``settle`` seconds."""
    counts = {}
    for name, call in calls.items():
        turn(call, 1)
        counts[name] = max(1, round(TURN_SECONDS / turn(call, 3, clock)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 7:
        for name, call in calls.items():
            settled = time.perf_counter() + settle
            while time.perf_counter() < settled:
                call()
            times[name].append(turn(call, counts[name], clock))
    return times


def measure(k: int, n: int, rows: int, group: int, args: argparse.Namespace) -> Result:
    """Median times in seconds, ratios, bandwidths in bytes a second."""
    calls, nbytes = contenders(k, n, rows, group, getattr(torch, args.dtype), args.bits)
    calls["bf16"]()  # every thread exists when priorities are set
    with priority(args.realtime):
        times = rounds(calls, args.seconds)
    peers = [name for name in PEERS if name in times]

    def ratios(name: str) -> dict[str, float]:
        return {p: statistics.median(a / b for a, b in zip(times[p], times[name], strict=True)) for p in peers}

    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "in": k,
        "out": n,
        "rows": rows,
        "group_size": group,
        "rounds": len(times["ours"]),
        "times": middle,
        "best": {name: min(values) for name, values in times.items()},
        "ratios": ratios("ours"),
        "int8_ratios": ratios("int8"),
        "gflops": 2 * rows * n * k / middle["ours"] / 1e9,
        "bytes_per_second": nbytes / middle["ours"],
        "read_bytes_per_second": READ_BYTES / middle["read"],
        "share_of_read": statistics.median(
            nbytes / b * a / READ_BYTES for a, b in zip(times["read"], times["ours"], strict=True)
        ),
    }


@contextlib.contextmanager
def priority(realtime: bool) -> Iterator[None]:
    """All threads before every other process, where that is asked for and allowed."""

    def change(policy: int, level: int) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(level))

    if realtime:
        change(os.SCHED_FIFO, 10)
    try:
        yield
    finally:
        if realtime:
            change(os.SCHED_OTHER, 0)


def describe(r: Result) -> str:
    ratios = "  ".join(f"{peer} {ratio:6.2f}" for peer, ratio in r["ratios"].items())
    return (
        f"{r['in']:5d}x{r['out']:<5d} rows {r['rows']:3d}  {r['times']['ours'] * 1e6:8.0f} us "
        f"(best {r['best']['ours'] * 1e6:8.0f})  {r['gflops']:5.0f} GFLOP/s  {r['bytes_per_second'] / 1e9:5.1f} GB/s = "
        f"{r['share_of_read']:4.0%} of read   peer/ours: {ratios}   bf16/int8: {r['int8_ratios']['bf16']:.2f}"
    )


def machine() -> Result:
    return {
        "processor": str(this_processor()),
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(path: Path, figures: Result) -> None:
    """Put a run's figures in the place of those of the same processor and number of threads."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data[f"{figures['machine']['processor']}, {figures['machine']['threads']} threads"] = figures
    path.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n")


def merge(path: Path, dtype: str, bits: int, result: Result) -> None:
    """Add a line to the file, in the place of one of the same shape and rows."""
    fresh: Result = {"machine": machine(), "dtype": dtype, "bits": bits, "results": []}
    data = {"bits": 4} | (json.loads(path.read_text()) if path.exists() else fresh)
    if any(data[key] != fresh[key] for key in ("machine", "dtype", "bits")):
        raise SystemExit(
            f"{path} holds figures of {data['machine']} {data['dtype']}, {data['bits']} bits, not of this run: name "
            "another file"
        )
    lines = {(-r["in"], r["out"], r["rows"]): r for r in (*data["results"], result)}
    data["results"] = [lines[key] for key in sorted(lines)]
    path.write_text(json.dumps(data, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--group-size", type=int, help="default: 128, or 64 where 128 does not divide the width")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of our weight")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of our input")
    parser.add_argument("--realtime", action="store_true", help="before all other processes while timing (Linux, root)")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            result = measure(k, n, rows, args.group_size or (128 if k % 128 == 0 else 64), args)
            print(describe(result), flush=True)
            if args.json:
                merge(args.json, args.dtype, args.bits, result)


if __name__ == "__main__":
    main()
