"""The table of docs/architectures.md that counts what became of every class, from docs/sweep.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

KINDS = {
    "CAUSAL_LM": "causal LM",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq LM",
    "MASKED_LM": "masked LM",
    "IMAGE_CLASSIFICATION": "image classification",
}
NO_PLACE = "the format has no place for it"
Rows = Mapping[str, Mapping[str, Any]]


def counts(data: Mapping[str, Any], markdown: Callable[[Iterable[str], Iterable[Iterable[object]]], str]) -> str:
    """A row for each kind, and which classes are missing or not better than rounding."""
    head = ("", "classes", "made small", "int4", "better than RTN", "save, load", "native", "awq: held", "equal")
    kinds: dict[str, Rows] = data["kinds"]
    table = markdown(head, ([KINDS[kind], *_numbers(rows)] for kind, rows in kinds.items()))
    return "\n\n".join([table, *_lists(kinds)])


def _numbers(rows: Rows) -> list[int]:
    made = [row for row in rows.values() if not row.get("problem")]
    tests: list[Callable[[Mapping[str, Any]], bool]] = [
        lambda row: row["layers"] > 0,
        lambda row: row["ratio"] is not None and row["ratio"] < 1,
        lambda row: row["saved"] == "equal",
        lambda row: row["native"] == "equal",
        lambda row: row["default"] != NO_PLACE,
        lambda row: row["default"] == "equal",
    ]
    return [len(rows), len(made), *(sum(map(test, made)) for test in tests)]


def _lists(kinds: Mapping[str, Rows]) -> list[str]:
    every = {name: row for rows in kinds.values() for name, row in rows.items()}
    absent = [f"{name} ({row['problem']})" for name, row in every.items() if row.get("problem")]
    worse = [f"{name} ({row['ratio']:.2f})" for name, row in every.items() if (row.get("ratio") or 0) >= 1]
    texts = {"Cannot be made small": absent, "Not better than RTN (output error relative to RTN's)": worse}
    return [f"{title}: {', '.join(names)}." for title, names in texts.items() if names]
