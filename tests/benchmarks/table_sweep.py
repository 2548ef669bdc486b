"""What becomes of every class of transformers' auto-mapping tables: made small, quantized, compared with rounding, saved, loaded.

    python tests/benchmarks/table_sweep.py [--jobs 2] [--json docs/sweep.json] [WORD ...]

A WORD chooses the classes whose kind, model type or name holds it; the file keeps what it has of others. tests/sweep.py says what
is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sweep
from architectures import SETTINGS
from shrunk_extra import CANNOT

Class = tuple[str, str, str]


def examined(one: Class) -> tuple[Class, dict[str, Any]]:
    """The facts of one class for the table; a reason in few words where it cannot be made."""
    result = sweep.run(*one)
    if not result.made:
        return one, {"problem": CANNOT.get(one[2], (result.problem,))[0]}
    facts = asdict(result) | {"ratio": None if math.isnan(result.ratio) else round(result.ratio, 3)}
    kept = {key: value for key, value in facts.items() if key not in ("made", "problem")}
    return one, kept | ({"problem": result.problem} if result.problem else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [one for one in sweep.everything() if not args.words or any(w in "/".join(one) for w in args.words)]
    found: dict[str, dict[str, Any]] = {kind: {} for kind, *_ in chosen}
    if args.json and args.words and args.json.exists():
        found = json.loads(args.json.read_text())["kinds"]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for one, facts in pool.imap(examined, chosen):
            found[one[0]]["/".join(one[1:])] = facts
            print("/".join(one), json.dumps(facts), flush=True)
            if args.json:
                args.json.write_text(written(found))


def written(found: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each class."""
    facts = {"transformers": version("transformers"), "group_size": SETTINGS["group_size"], "kinds": found}
    rows = {json.dumps(row): row for kind in found.values() for row in kind.values()}
    text = json.dumps(facts, indent=1)
    for line, row in rows.items():
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n   "), line)
    return text + "\n"


if __name__ == "__main__":
    main()
