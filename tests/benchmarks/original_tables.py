"""The tables of tables.py on models that were never rounded before, and on lm_eval's scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
Markdown = Callable[[Iterable[str], Iterable[Iterable[object]]], str]
MISSING = "not run"
TITLES = {"mgm": "MGM", "whisper": "Whisper tiny.en", "minilm": "MiniLM", "smollm2": "SmolLM2-135M"}


def _share(one: Data) -> str:
    """A share and its interval, in percent."""
    return f"{one['value']:.0%} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"


def shares(data: Data, markdown: Markdown) -> str:
    """What RTN loses, and which share of it each method wins back; a line for each model, setting and kind of input."""
    methods = [label for label in _labels(data) if label not in ("float", "rtn")]
    head = ("", "scored on", "perplexity, float → RTN", "RTN's distance", *methods)

    def row(model: str, setting: str, cell: Data, name: str) -> list[str]:
        floating, rtn = (cell["rows"][label]["measures"][name] for label in ("float", "rtn"))
        both = [f"{one['perplexity']['value']:.4g}" for one in (floating, rtn) if "perplexity" in one]
        distance = f"{abs(rtn[cell['measure']]['value']):.2g}"
        closed = (_share(cell["rows"][o]["closed"][name]) if o in cell["rows"] else MISSING for o in methods)
        scored = f"{name}, {cell['scored'][name]['windows']}"
        return [f"{TITLES[model]}, {setting}", scored, " → ".join(both), distance, *closed]

    lines = (
        row(model, setting, cell, name)
        for model, found in data.items()
        for setting, cell in found["settings"].items()
        for name in cell["scored"]
    )
    return markdown(head, lines)


def perplexities(data: Data, markdown: Markdown) -> str:
    """Of models with next tokens: the perplexity of every method."""
    labels = _labels(data)

    def value(cell: Data, label: str, name: str) -> str:
        measures = cell["rows"].get(label, {"measures": {}})["measures"]
        return f"{measures[name]['perplexity']['value']:.4g}" if measures else MISSING

    lines = [
        [f"{TITLES[model]}, {setting}", name, *(value(cell, label, name) for label in labels)]
        for model, found in data.items()
        for setting, cell in found["settings"].items()
        for name in cell["scored"]
        if cell["measure"] == "kl"
    ]
    return markdown(("perplexity", "scored on", *labels), lines)


def _labels(data: Data) -> list[str]:
    """All rows that there are, in the order of the cell that has most."""
    cells = [cell for found in data.values() for cell in found["settings"].values()]
    return list(max((cell["rows"] for cell in cells), key=len))


def sources(data: Data, markdown: Markdown) -> str:
    """Where each model is from, and how many distinct values its groups hold."""
    sizes = ("32", "64", "128")
    head = ("", "package of PyPI", "licence", *(f"distinct values in {size}" for size in sizes))
    rows = (
        [TITLES[name], f"`{one['package'].replace(' ', '==')}`", one["licence"]]
        + [f"{one['distinct'][size][1]:.1f}" for size in sizes]
        for name, one in data.items()
    )
    return markdown(head, rows)


def tasks(data: Data, markdown: Markdown) -> str:
    """Accuracies of lm_eval with their standard errors, and how many questions a model answers otherwise than the float one."""
    labels = list(max((found["rows"] for found in data.values()), key=len))

    def cell(found: Data, label: str, name: str) -> str:
        if label not in found["rows"]:
            return MISSING
        one = found["rows"][label][name]
        others = "" if label == "float" else f", {one['other_answers']}"
        return f"{one['acc']:.3f} ± {one['stderr']:.3f}{others}"

    rows = (
        [f"{TITLES[model]}, {name}", count, *(cell(found, label, name) for label in labels)]
        for model, found in data.items()
        for name, count in found["questions"].items()
    )
    (setting,) = {found["setting"] for found in data.values()}
    return markdown((f"accuracy, {setting}", "questions", *labels), rows)
