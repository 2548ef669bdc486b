"""Times what turns codes into a layer and back, against the speed of reading memory in the same run.

    python tests/benchmarks/bench_pack.py [--shape 4096x4096] [--json FILE] [--autoawq PYTHON]

pack and unpack: codes uint8 <-> two a byte. tile and untile: two a byte <-> the layout of the kernels. "from float to layer":
quantizing a bf16 weight, packing and tiling. Bytes are those read and written; several copies take turns, so that nothing is
in a cache. --autoawq: the Python of an environment that has autoawq 0.2.9 (which needs transformers 4.51.3); its
`WQLinear_GEMM.from_linear` packs the same shape there, with scales and zeros given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from bench_linear import READ_BYTES, copies, machine, priority, read_memory, rounds, turns

from awq_ext import _C
from awq_ext.kernels import reference

GROUP = 128
AUTOAWQ = """
import importlib.metadata, json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
k, n, group = map(int, sys.argv[1:])
linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
scales = torch.rand(n, k // group, dtype=torch.float16) + 0.5
zeros = torch.full((n, k // group), 8.0, dtype=torch.float16)
times = []
for _ in range(2):
    start = time.perf_counter()
    WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    times.append(time.perf_counter() - start)
print(json.dumps({"version": importlib.metadata.version("autoawq"), "seconds": min(times)}))
"""


def autoawq(python: str, k: int, n: int) -> dict[str, object]:
    """Its version, and seconds (the better of two)."""
    command = [python, "-c", AUTOAWQ, str(k), str(n), str(GROUP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} could not run autoawq:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def layer(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, scales, zeros = _C.quantize_weight(weight, GROUP)
    tiles = _C.tile_codes(_C.pack_int4(codes), weight.shape[1], GROUP, 4)
    return tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, 4)


def contenders(k: int, n: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> call, bytes read and written."""
    codes, half = n * k, n * k // 2
    made = [torch.randint(0, 16, (n, k), dtype=torch.uint8) for _ in range(copies(codes))]
    packed = [_C.pack_int4(c) for c in made]
    tiles = [_C.tile_codes(p, k, GROUP, 4) for p in packed]
    weight = torch.randn(n, k).bfloat16()

    def each(inputs: list[torch.Tensor], function: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return turns([lambda t=t: function(t) for t in inputs])

    return {
        "pack": (each(made, _C.pack_int4), codes + half),
        "unpack": (each(packed, lambda p: _C.unpack_int4(p, k)), codes + half),
        "tile": (each(packed, lambda p: _C.tile_codes(p, k, GROUP, 4)), 2 * half),
        "untile": (each(tiles, lambda t: _C.untile_codes(t, n, k, GROUP, 4)), 2 * half),
        "from float to layer": (lambda: layer(weight), 2 * codes + half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="in x out")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--realtime", action="store_true", help="before all other processes while timing (Linux, root)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--autoawq", metavar="PYTHON", help="of an environment with autoawq")
    args = parser.parse_args()
    k, n = map(int, args.shape.split("x"))
    found = contenders(k, n)
    calls = {name: call for name, (call, _) in found.items()} | {"read": read_memory()}
    calls["pack"]()  # every thread exists when priorities are set
    with priority(args.realtime):
        times = rounds(calls, args.seconds)
    results = {}
    for name, (_, nbytes) in found.items():
        shares = [nbytes / own * read / READ_BYTES for own, read in zip(times[name], times["read"], strict=True)]
        seconds = statistics.median(times[name])
        results[name] = {"seconds": seconds, "bytes": nbytes, "share_of_read": statistics.median(shares)}
    data = {"machine": machine(), "in": k, "out": n, "results": results}
    if args.autoawq:
        data["autoawq"] = autoawq(args.autoawq, k, n)
    print(json.dumps(data, indent=1))
    if args.json:
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
