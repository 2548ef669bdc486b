"""AWQ's error against RTN's over many seeds, with norms before the Linears (Llama, Qwen3) and behind them (OLMo2, EXAONE 4).

    python tests/benchmarks/bench_norm_places.py [--width 64] [--seeds 24] [--batches 8] [--tokens 32] [--weights loud flat own]

For each family: geometric mean and standard deviation of the ratio of the logits' errors on other tokens than calibration had; how
many seeds have AWQ no better than RTN; what the layers' own losses say (root of their mean ratio).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from norm_places import BEFORE, BEHIND, WEIGHTS, ratio, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--batches", type=int, default=8, help="of two windows, for calibration")
    parser.add_argument("--tokens", type=int, default=32, help="in a window")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for weights in args.weights:
        of_seeds = {}
        for family in (*BEFORE, *BEHIND):
            ratios = [ratio(family, weights, args.width, s, args.batches, args.tokens) for s in range(args.seeds)]
            found = summary(ratios)
            of_seeds[family] = torch.tensor([one.model for one in ratios])
            print(
                f"{weights:5s} {family:8s} {found['mean']:.3f} ± {found['spread']:.3f}, "
                f"{int((of_seeds[family] >= 1).sum())} of {len(ratios)} at 1 or above; layers {found['layers']:.3f}",
                flush=True,
            )
        together = torch.corrcoef(torch.stack([of_seeds[family] for family in BEHIND]))[0, 1]
        print(f"{weights:5s} correlation of {' and '.join(BEHIND)} over seeds: {together:.2f}", flush=True)


if __name__ == "__main__":
    main()
