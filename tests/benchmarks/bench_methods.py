"""All methods on all kinds of traffic: perplexity, KL divergence, top-1 agreement with the float model, with intervals.

    python tests/benchmarks/bench_methods.py MODEL_DIR --calib calib.txt --traffic code.txt de=multi-de.txt ...
        [--bits 4 3] [--group-size 64 128] [--method rtn awq awq,clip=false ...] [--rest 16384] [--json out.json]
        [--markdown out.md]

MODEL_DIR: a local Transformers directory. Calibration: --samples windows of --seq tokens; scoring: the first --tokens tokens of
each text, in windows of --seq without overlap; with --rest also as many tokens of the calibration text itself, from where
calibration stopped. Every combination of bits and group size is one awq_ext.compare(). --json adds to what the file holds of
other models and combinations, so that a table can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.cli.options.settings import parse_method
from awq_ext.evaluation.comparison import Comparison
from awq_ext.reporting.tables import Cell, Table

METHODS = [
    "rtn",
    "awq",
    "awq,clip=false",
    "gptq",
    "awq+gptq",
    "gptq,propagate=quantized",
    "awq+gptq,propagate=quantized",
]


def wide(found: Comparison, title: str, measure: str) -> Table:
    """A line for each method, a column for each kind of traffic; bold the best, ≈ what cannot be told apart from it."""
    rows = []
    based = any(row.label == "rtn" and not row.error for row in found.rows)
    for row in found.rows:
        if row.error or measure not in row.evaluations[found.traffic[0]].measures:
            continue
        cells = [Cell(row.label)]
        for name in found.traffic:
            order = found.best(name, measure) if row.config else []
            text = f"{row.evaluations[name].measures[measure].value:.4g}"
            share = (
                found.gap_closed(row.label, name)
                if based and measure == "perplexity" and row.config and row.label != "rtn"
                else None
            )
            text += "" if share is None else f" ({share:.0%})"
            cells.append(Cell(text + (" ≈" if row.label in order[1:] else ""), best=row.label in order[:1]))
        rows.append([*cells, Cell("" if row.seconds is None else f"{row.seconds:.0f}")])
    return Table(f"{title}: {measure}", ["method", *found.traffic, "seconds"], rows)


def figures(found: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """What the documents' tables are made of: values without intervals, and which methods cannot be told from the best."""
    rows = {
        row.label: {
            "seconds": row.seconds,
            "measures": {name: {m: one.value for m, one in e.measures.items()} for name, e in row.evaluations.items()},
        }
        for row in found.rows
    }
    best = {name: {m: found.best(name, m) for m in found.measures} for name in found.traffic}
    settings = {name: getattr(args, name) for name in ("samples", "seq", "tokens", "rest")}
    return {"settings": settings, "threads": found.threads, "traffic": list(found.traffic), "best": best, "rows": rows}


def add(path: Path, model: str, title: str, cell: dict[str, Any]) -> None:
    """Put one combination into the file, others kept."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(model, {})[title] = cell
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, nargs="+", required=True)
    parser.add_argument("--traffic", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--method", nargs="+", default=METHODS)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--rest", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()

    tokenizer, model = hf.load_tokenizer(args.model), hf.load_model(args.model, args.dtype)
    calib = texts.windows(args.calib, tokenizer, args.samples + args.rest // args.seq, args.seq)
    calib, rest = calib[: args.samples], calib[args.samples :]
    count = -(-args.tokens // args.seq)
    traffic = {
        name: texts.windows([path], tokenizer, count, args.seq) for name, path in hf.named_texts(args.traffic).items()
    }
    if rest:
        traffic["rest of calib"] = rest
    pages = []
    for bits in args.bits:
        for group_size in args.group_size:
            title = f"W{bits} g{group_size}"
            methods = [parse_method(text) for text in args.method]
            settings = {"bits": bits, "group_size": group_size, "packed": bits == 4}
            began = time.perf_counter()
            found = awq_ext.compare(model, calib, traffic, methods, tokenizer=tokenizer, **settings)
            print(f"\n== {title}, {time.perf_counter() - began:.0f} s in all")
            print(found, flush=True)
            pages += [wide(found, title, measure).to_markdown() for measure in found.measures]
            # after each, so that an interrupt loses nothing that was measured
            if args.markdown:
                args.markdown.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
            if args.json:
                add(args.json, args.model.absolute().name, title, figures(found, args))


if __name__ == "__main__":
    main()
