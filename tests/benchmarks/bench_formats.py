"""Packing and unpacking of each checkpoint layout, in millions of weights a second, beside a plain copy of the same codes.

python tests/benchmarks/bench_formats.py [--out-features N] [--in-features K] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from awq_ext.checkpoints.formats import LAYOUTS, Facts, PackedLinear, Summary
from awq_ext.checkpoints.formats.packed import SYMMETRIC_ZERO

GROUP, ROUNDS = 128, 7


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=14336)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    n, k = options.out_features, options.in_features
    layer = PackedLinear(
        qweight=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        scales=(torch.rand(n, k // GROUP) * 0.01 + 0.001).half(),
        zeros=torch.full((n, k // GROUP), SYMMETRIC_ZERO, dtype=torch.uint8),  # the one kind that all layouts hold
        in_features=k,
        group_size=GROUP,
    )
    rates: dict[str, dict[str, float]] = {}
    print(f"{n} x {k}, groups of {GROUP}, {torch.get_num_threads()} threads; copy: of the packed codes")
    for name, layout in LAYOUTS.items():
        settings = layout.reads(layout.quantization_config(Summary({"layer": Facts.of(layer)})))
        assert settings is not None
        tensors = layout.pack(layer)
        times: dict[str, list[float]] = {"copy": [], "pack": [], "unpack": []}
        for _ in range(ROUNDS):
            times["copy"].append(seconds(layer.qweight.clone))
            times["pack"].append(seconds(lambda: layout.pack(layer)))  # noqa: B023
            times["unpack"].append(seconds(lambda: layout.unpack(tensors, settings.of("layer"))))  # noqa: B023
        rates[name] = {what: n * k / 1e6 / statistics.median(found) for what, found in times.items()}
        print(f"{name:20}", *(f"{what} {rate:10.0f} M/s  " for what, rate in rates[name].items()))
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
