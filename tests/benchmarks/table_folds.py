"""What the scales of each architecture are folded into: a Markdown table over the small random models of the tests.

    python tests/benchmarks/table_folds.py [--group-size 16] [NAME ...]

A group: the Linears that share one input. norm, linear: folded into one; run time: divided at run time; unscaled: rounding was
best without.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures

import awq_ext

COLUMNS = ("norm", "linear", "run time", "unscaled")


def row(name: str, group_size: int) -> str:
    """One line of the table."""
    case = architectures.make(name)
    awq_ext.quantize(case.model, case.batches, group_size=group_size, min_tokens=1, progress=False)
    counts = architectures.fold_counts(case.model.awq_report)
    cells = [name, str(sum(counts.values())), *(str(counts[column]) for column in COLUMNS)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--group-size", type=int, default=16)
    args = parser.parse_args()
    if unknown := sorted({*args.names} - {*architectures.NAMES}):
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(architectures.NAMES)}")
    torch.set_num_threads(1)
    print(f"| {' | '.join(('architecture', 'groups', *COLUMNS))} |")
    print("|---|" + "--:|" * (1 + len(COLUMNS)))
    for name in args.names or architectures.NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(row(name, args.group_size), flush=True)


if __name__ == "__main__":
    main()
