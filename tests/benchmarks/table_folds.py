"""What the scales of each architecture are folded into, over the small random models of the tests.

    python tests/benchmarks/table_folds.py [--group-size 16] [--json docs/folds.json] [NAME ...]

A group: the Linears that share one input. norm, linear: folded into one; run time: divided at run time; unscaled: rounding was
best without.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures

import awq_ext

COLUMNS = ("norm", "linear", "run time", "unscaled")


def counts(name: str, group_size: int) -> dict[str, int]:
    """Scale groups of one architecture by what takes their 1/s."""
    case = architectures.make(name)
    awq_ext.quantize(case.model, case.batches, group_size=group_size, min_tokens=1, progress=False)
    return architectures.fold_counts(case.model.awq_report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := sorted({*args.names} - {*architectures.NAMES}):
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(architectures.NAMES)}")
    torch.set_num_threads(1)
    found = {}
    print(f"{'architecture':32s}  {'  '.join(COLUMNS)}")
    for name in args.names or architectures.NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = counts(name, args.group_size)
        cells = (str(found[name][column]).rjust(len(column)) for column in COLUMNS)
        print(f"{name:32s}  {'  '.join(cells)}", flush=True)
    if args.json:
        facts = {"transformers": version("transformers"), "group_size": args.group_size, "groups": found}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
