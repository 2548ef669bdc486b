"""Times quant_linear and quantize() beside processes that keep a processor busy each, this build and another by turns.

    python tests/benchmarks/bench_busy.py [--against DIRECTORY] [--busy 0,1,2] [--rounds R] [--json FILE]

DIRECTORY is the root of another tree with a compiled extension. Each build lives in a process of its own; while one has
its turn the others sleep. A turn is a fifth of a second of calls, or one quantize(). Reported is the median over rounds
of the mean time of a call in a turn: interruptions last milliseconds, so the median of single calls would not show them.
Other work on the machine falsifies "0". On Linux root can give all processes here the precedence over other sessions:

    setsid --wait sh -c 'echo -20 > /proc/self/autogroup; exec python tests/benchmarks/bench_busy.py'

Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TURN_SECONDS = 0.2
PAUSE_SECONDS = 0.05  # until the OpenMP threads of the one that was timed last are asleep
COPIES = 4  # of each weight, called by turns
# name -> in_features, out_features, rows
LINEARS = {
    "4096 x 4096, 1 row": (4096, 4096, 1),
    "4096 x 4096, 16 rows": (4096, 4096, 16),
    "4096 x 4096, 512 rows": (4096, 4096, 512),
    "576 x 1536, 1 row": (576, 1536, 1),
}
QUANTIZE = "quantize() a small block"


def linear_calls(k: int, n: int, rows: int) -> Callable[[], int]:
    """A function that calls each copy once and returns the number of calls."""
    import torch

    from awq_ext import _C
    from awq_ext.kernels import reference
    from awq_ext.layers import ops

    group = 128 if k % 128 == 0 else 64
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k) / k**0.5, group, scale_dtype=torch.bfloat16)
    packed, x = _C.pack_int4(codes), torch.randn(rows, k).bfloat16()
    layers = [
        (_C.tile_codes(packed, k, group, 4), reference.tile_scales(scales), reference.tile_zeros(zeros, 4))
        for _ in range(COPIES)
    ]

    def calls() -> int:
        for layer in layers:
            ops.quant_linear(x, *layer, None, None, k, n, group, 4, "auto")
        return COPIES

    return calls


def quantize_call() -> int:
    """Quantize one block of a Llama with 256 channels, from float to int4."""
    import torch

    import awq_ext
    from awq_ext.demo.model import ByteLlama, ByteLlamaConfig

    torch.manual_seed(0)
    model = ByteLlama(ByteLlamaConfig(256, 768, 1, 4, 4, 256)).bfloat16().eval()
    calib = [torch.randint(0, 256, (1, 256)) for _ in range(16)]
    awq_ext.quantize(model, calib, group_size=64, progress=False)
    return 1


def serve(threads: int) -> None:
    """A build: for each name read, a turn, and its seconds a call written."""
    import torch

    torch.set_num_threads(threads)
    calls: dict[str, Callable[[], int]] = {name: linear_calls(*shape) for name, shape in LINEARS.items()}
    calls[QUANTIZE] = quantize_call
    for line in sys.stdin:
        call = calls[line.strip()]
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < TURN_SECONDS:
            count += call()
        print(f"seconds {seconds / count}", flush=True)


class Build:
    """A process with the extension of one tree."""

    def __init__(self, root: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--threads", str(threads)],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def turn(self, name: str) -> float:
        """Seconds a call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the process of a build ended at {name!r}; its error is above")

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(builds: dict[str, Build], busy: int, rounds: int) -> list[dict[str, Any]]:
    """A line for each name; the first turns are not counted."""
    lines = []
    for name in [*LINEARS, QUANTIZE]:
        for build in builds.values():
            build.turn(name)
        times: dict[str, list[float]] = {label: [] for label in builds}
        with busy_processes(busy):
            for _ in range(rounds):
                for label, build in builds.items():
                    time.sleep(PAUSE_SECONDS)
                    times[label].append(build.turn(name))
        medians = {label: statistics.median(found) for label, found in times.items()}
        lines.append({"name": name, "busy": busy, "seconds": medians, "rounds": times})
        text = ", ".join(f"{label} {seconds * 1e6:.0f} us" for label, seconds in medians.items())
        ratio = f", {medians['before'] / medians['now']:.2f}x" if "before" in medians else ""
        print(f"beside {busy}: {name}: {text}{ratio}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="root of another tree, with its compiled extension")
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.threads)
    builds = {"before": Build(args.against.resolve(), args.threads)} if args.against else {}
    builds["now"] = Build(ROOT, args.threads)
    lines = [line for busy in map(int, args.busy.split(",")) for line in measure(builds, busy, args.rounds)]
    for build in builds.values():
        build.close()
    if args.json:
        facts = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": args.threads}
        args.json.write_text(json.dumps({"facts": facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
