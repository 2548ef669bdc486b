"""Seconds to quantize Llama-type blocks of a given size, split into what grows with calibration and what does not.

    python tests/benchmarks/bench_block.py [--hidden 2048 --intermediate 8192 --heads 32 --kv-heads 8] [--samples 8,16,32]

The default is one block of Llama-3.2-1B's size in bfloat16 with random weights, 512-token samples, asymmetric groups of 128:
statistics, scales, clips, rounding, packing, everything that ``quantize`` does. Prints one line a calibration size.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import awq_ext
from awq_ext.demo.model import ByteLlama, ByteLlamaConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", default="8,16,32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--refine", type=int, default=awq_ext.AwqConfig.refine, help="0 does not fit the groups' scales"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    config = ByteLlamaConfig(args.hidden, args.intermediate, args.blocks, args.heads, args.kv_heads, args.tokens)
    rows = []
    for samples in map(int, args.samples.split(",")):
        runs = [one_run(config, samples, args) for _ in range(args.repeat)]
        best = min(runs, key=lambda run: run["seconds"])
        rows.append(best | {"runs": [run["seconds"] for run in runs]})
        print(
            f"{samples} x {args.tokens} tokens: {best['seconds']:.1f} s (runs {', '.join(f'{s:.1f}' for s in rows[-1]['runs'])}) "
            f"= calibration {best['calibration']:.1f} + search {best['search']:.1f} + survey and the rest; "
            f"peak {best['peak_mib']:.0f} MiB, planned {best['planned_mib']:.0f} MiB",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1, default=str))


def one_run(config: ByteLlamaConfig, samples: int, args: argparse.Namespace) -> dict[str, float]:
    """Quantize a fresh model; seconds and MiB."""
    torch.manual_seed(0)
    model = ByteLlama(config).bfloat16().eval()
    calib = [torch.randint(0, 256, (1, args.tokens)) for _ in range(samples)]
    start = time.perf_counter()
    awq_ext.quantize(model, calib, group_size=args.group_size, refine=args.refine, progress=False)
    seconds = time.perf_counter() - start
    report = model.awq_report
    assert all(layer.loss <= layer.loss_rtn for layer in report.layers if layer.loss is not None)
    return {
        "samples": samples,
        "seconds": seconds,
        "calibration": report.calibration_seconds,
        "search": report.search_seconds,
        "peak_mib": report.peak_memory_bytes / 2**20,
        "planned_mib": report.planned_memory_bytes / 2**20,
    }


if __name__ == "__main__":
    main()
