"""Would packed weights of 3 bits be faster? A prototype of such a kernel beside one of 4 bits and beside our layer, one row.

    python tests/benchmarks/bench_three_bits.py [--shapes 4096x4096,...] [--seconds S] [--threads T] [--cpu-time] [--json FILE]

three_bits.cpp is compiled when this runs, by g++ (or $CXX); the processor needs AVX-512 with VBMI, VNNI and BF16. First every
kernel must give the product of the decoded weights. Then all take turns as in bench_linear.py: a turn is about two milliseconds
on copies that are in no cache, a ratio is the median over rounds, and reading memory takes part. "layer" is quant_linear with 4
bits, as a QuantLinear calls it, "layer int8" the same with compute_dtype="int8"; "four" is the prototype's own kernel of 4 bits, so
that "packed" and "planes" have an equal to compare with. "int8" kernels take an input that is rounded already. A shape is
in_features x out_features.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_linear import READ_BYTES, copies, machine, ours, read_memory, rounds, turns
from torch import Tensor

SOURCE = Path(__file__).with_name("three_bits.cpp")
KINDS = {  # name -> function, bits
    "four": ("four_bits", 4),
    "packed": ("packed", 3),
    "planes": ("planes", 3),
    "four int8": ("four_bits_int8", 4),
    "packed int8": ("packed_int8", 3),
}


def compiled(folder: Path) -> ctypes.CDLL:
    """The prototype, with the OpenMP that torch has loaded, so that both share one team of threads."""
    openmp = next(Path(torch.__file__).with_name("lib").glob("libgomp*"))
    flags = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, "-c", SOURCE, "-o", folder / "three_bits.o"], check=True)
    subprocess.run([compiler, "-shared", folder / "three_bits.o", openmp, "-o", folder / "three_bits.so"], check=True)
    return ctypes.CDLL(str(folder / "three_bits.so"))


def half_steps(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] as uint8 [tile, step, half, 64]: the bytes of 16 outputs, four channels each, in the order 0, 2, 1, 3."""
    n, k = codes.shape
    tiles = codes.view(n // 32, 2, 16, k // 4, 4)[..., [0, 2, 1, 3]]
    return tiles.permute(0, 3, 1, 2, 4).reshape(n // 32, k // 4, 2, 64)


def four_bits(codes: Tensor) -> Tensor:
    halves = half_steps(codes)
    return halves[:, :, 0] | halves[:, :, 1] << 4


def packed(codes: Tensor) -> Tensor:
    words = half_steps(codes).view(codes.shape[0] // 32, codes.shape[1] // 4, 2, 8, 8).long()
    places = 3 * torch.arange(8)
    words = (words[:, :, 0] << places).sum(-1) | (words[:, :, 1] << 24 + places).sum(-1)
    return (words[..., None] >> 8 * torch.arange(6) & 255).to(torch.uint8)


def planes(codes: Tensor) -> Tensor:
    halves = half_steps(codes).view(
        codes.shape[0] // 32, codes.shape[1] // 16, 2, 2, 2, 64
    )  # [.., pair of steps, step, half]
    low = ((halves & 3) << torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8)[..., None]).sum((3, 4), dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8).view(2, 2, 2, 1)
    high = (halves >> 2 << places).sum((2, 3, 4), dtype=torch.uint8)
    return torch.cat([low.flatten(2), high], 2)


LAYOUTS = {layout.__name__: layout for layout in (four_bits, packed, planes)}


def in_large_pages(data: Tensor) -> Tensor:
    """A copy on pages of 2 MiB where the system gives them, as our own tiles lie, with 64 bytes to spare behind."""
    huge, size = 1 << 21, data.numel() + 64
    room = torch.empty(size + 2 * huge, dtype=torch.uint8)
    start = -room.data_ptr() % huge
    ctypes.CDLL(None).madvise(ctypes.c_void_p(room.data_ptr() + start), ctypes.c_size_t(size // huge * huge + huge), 14)
    room[start : start + data.numel()] = data.flatten()
    return room[start : start + data.numel()]


class Weight:
    """Random codes, scales and zeros of a layer, and what they stand for."""

    def __init__(self, k: int, n: int, group: int, bits: int) -> None:
        self.codes = torch.randint(1 << bits, (n, k), dtype=torch.uint8)
        self.zeros = torch.randint(1 << bits, (n, k // group), dtype=torch.uint8)
        self.scales = (torch.rand(n, k // group) / 64 + 1 / 64).bfloat16()
        self.group = group

    def float(self) -> Tensor:
        spread = [part.repeat_interleave(self.group, 1) for part in (self.zeros.float(), self.scales.float())]
        return (self.codes - spread[0]) * spread[1]

    def tiled(self) -> tuple[Tensor, Tensor]:
        """Scales [tile, group, 32] and zeros [tile, group, 16]."""
        tiles = self.codes.shape[0] // 32
        scales = self.scales.view(tiles, 32, -1).transpose(1, 2).contiguous()
        zeros = self.zeros.view(tiles, 2, 16, -1).permute(0, 3, 1, 2)
        return scales, (zeros[:, :, 0] | zeros[:, :, 1] << 4).contiguous()


def as_int8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [1, K] as int8 in the kernels' order of channels, without its step, and the sums of its groups, int32."""
    step = float(x.abs().max()) / 127
    rounded = (x[0].float() / step).round()
    return rounded.view(-1, 4)[:, [0, 2, 1, 3]].flatten().to(torch.int8), rounded.view(-1, group).sum(1).int()


def contender(library: ctypes.CDLL, kind: str, x: Tensor, n: int, group: int) -> tuple[Callable[[], object], int]:
    """A kernel on as many copies as no cache holds, and the bytes of one, after its product was compared."""
    name, bits = KINDS[kind]
    k, weight = x.shape[1], Weight(x.shape[1], n, group, bits)
    codes, (scales, zeros) = LAYOUTS[name.removesuffix("_int8")](weight.codes), weight.tiled()
    nbytes, y = codes.numel() + scales.nbytes + zeros.nbytes, torch.empty(n)
    rounded, sums = as_int8(x, group)
    inputs = (rounded, sums) if name.endswith("_int8") else (x,)
    function = getattr(library, name)
    sizes = [ctypes.c_int64(size) for size in (n, k, group)]

    def call(own: tuple[Tensor, ...]) -> Callable[[], object]:
        held = (*own, *inputs, y)
        pointers = [ctypes.c_void_p(part.data_ptr()) for part in held]
        return lambda held=held: function(*pointers, *sizes)

    layers = [(in_large_pages(codes), scales.clone(), zeros.clone()) for _ in range(copies(nbytes))]
    call(layers[0])()
    seen = rounded.view(-1, 4)[:, [0, 2, 1, 3]].flatten().float() if len(inputs) == 2 else x[0].float()
    torch.testing.assert_close(y, weight.float() @ seen, rtol=1e-3, atol=1e-3 * float(y.norm()) / n**0.5)
    return turns([call(layer) for layer in layers]), nbytes


def measure(library: ctypes.CDLL, k: int, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each contender, and the ratios to the layer that has its kind of input."""
    x = torch.randn(1, k).bfloat16()
    calls, sizes = {}, {"read": READ_BYTES}
    for name, dtype in (("layer", "auto"), ("layer int8", "int8")):
        calls[name], sizes[name] = ours(x, n, args.group_size, torch.bfloat16, dtype)
    for kind in KINDS:
        calls[kind], sizes[kind] = contender(library, kind, x, n, args.group_size)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    times = rounds(calls | {"read": read_memory()}, args.seconds, clock=clock)

    def ratio(name: str) -> float:
        layer = times["layer int8" if name.endswith("int8") else "layer"]
        return statistics.median(a / b for a, b in zip(layer, times[name], strict=True))

    return {
        "in": k,
        "out": n,
        "group_size": args.group_size,
        "rounds": len(times["layer"]),
        "times": {name: statistics.median(each) for name, each in times.items()},
        "best": {name: min(each) for name, each in times.items()},
        "bytes": sizes,
        "ratios": {name: ratio(name) for name in calls},
    }


def describe(line: dict[str, Any]) -> str:
    shown = [f"{line['in']}x{line['out']}, groups of {line['group_size']}, {line['rounds']} rounds"]
    for name, seconds in line["times"].items():
        ratio = f"  {line['ratios'][name]:.2f} times the layer" if name in line["ratios"] else ""
        rate = line["bytes"][name] / seconds / 1e9
        shown.append(
            f"  {name:11} {seconds * 1e6:6.0f} us (best {line['best'][name] * 1e6:6.0f})  {rate:5.1f} GB/s{ratio}"
        )
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,14336x4096")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the thread alone, for a busy machine: --threads 1"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        raise SystemExit("--cpu-time counts one thread: it needs --threads 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        for shape in args.shapes.split(","):
            k, n = map(int, shape.split("x"))
            lines.append(measure(library, k, n, args))
            print(describe(lines[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
