"""The tables of tables.py that show quality: methods on kinds of traffic, and other tools beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
Markdown = Callable[[Iterable[str], Iterable[Iterable[object]]], str]
BOTH = "awq+gptq"
# Rows of other tools, and ours that does the same.
SAME = {
    "llmcompressor awq": "awq_ext awq",
    "llmcompressor gptq": "awq_ext gptq",
    "autoawq": "awq_ext awq",
    "auto-round light": "awq_ext best",
    "auto-round": "awq_ext best",
}


def value(cell: Data, label: str, text: str, measure: str) -> float:
    return cell["rows"][label]["measures"][text][measure]


def closed(cell: Data, label: str, text: str, measure: str) -> float:
    """The share of RTN's gap to the float model that a method closes; the float model's divergence from itself is 0."""
    goal = value(cell, "float", text, measure) if measure == "perplexity" else 0.0
    worst = value(cell, "rtn", text, measure)
    return (worst - value(cell, label, text, measure)) / (worst - goal)


def mean_closed(cell: Data, label: str, measure: str) -> float:
    return sum(closed(cell, label, text, measure) for text in cell["traffic"]) / len(cell["traffic"])


def labels(cell: Data) -> list[str]:
    return [label for label in cell["rows"] if label != "float"]


def one_cell(cell: Data, measure: str, markdown: Markdown) -> str:
    """Methods by kinds of traffic: the measure, and the share of RTN's gap that is closed."""

    def entry(label: str, text: str) -> str:
        order = cell["best"][text][measure]
        shown = f"{value(cell, label, text, measure):.{3 if measure == 'perplexity' else 4}f}"
        if label not in ("float", "rtn"):
            shown += f" ({closed(cell, label, text, measure):.0%})"
        return f"**{shown}**" if label == order[0] else f"{shown} ≈" if label in order else shown

    shown = labels(cell) if measure == "kl" else list(cell["rows"])
    rows = [[label, *(entry(label, text) for text in cell["traffic"])] for label in shown]
    return markdown((measure, *cell["traffic"]), rows)


def all_cells(data: Data, markdown: Markdown) -> str:
    """Every model, bits and group size: perplexity and divergence."""
    parts = []
    for model, cells in data.items():
        for title, cell in cells.items():
            s = cell["settings"]
            calibrated = (
                f"Calibrated on {s['samples']} x {s['seq']} tokens, scored on {s['tokens']} tokens of each text."
            )
            parts.append(f"### {model}, {title}\n\n{calibrated}")
            parts += [one_cell(cell, measure, markdown) for measure in ("perplexity", "kl")]
    return "\n\n".join(parts)


def _as_good(cell: Data, label: str, text: str, measure: str) -> bool:
    return value(cell, label, text, measure) <= min(value(cell, one, text, measure) for one in ("awq", "gptq"))


def at_least_best(cell: Data, label: str, measure: str) -> str:
    """On how many kinds of traffic ``label`` is as good as the better of AWQ and GPTQ alone."""
    return f"{sum(_as_good(cell, label, text, measure) for text in cell['traffic'])} of {len(cell['traffic'])}"


def not_worse(cell: Data, label: str, measure: str) -> str:
    """Likewise, or differs from the best of all methods by no more than the noise: then from the better of the two too."""
    good = sum(_as_good(cell, label, text, measure) or label in cell["best"][text][measure] for text in cell["traffic"])
    return f"{good} of {len(cell['traffic'])}"


def among_best(cell: Data, label: str, measure: str) -> str:
    """On how many kinds of traffic ``label`` is the best of all methods, or differs from it by no more than the noise."""
    return f"{sum(label in order[measure] for order in cell['best'].values())} of {len(cell['best'])}"


def summary(data: Data, markdown: Markdown) -> str:
    """A line for each model, bits and group size: the mean share that each method closes."""
    cells = [(f"{model}, {title}", cell) for model, found in data.items() for title, cell in found.items()]
    shared = [label for label in labels(cells[0][1]) if all(label in cell["rows"] for _, cell in cells)]
    shared.remove("rtn")
    head = ("share of RTN's gap closed, perplexity / divergence", *shared)
    head += (
        f"texts on which {BOTH} is at least as good as AWQ and GPTQ alone",
        "or not significantly worse",
        "the best of all, or not significantly different",
    )

    def row(name: str, cell: Data) -> list[str]:
        means = [" / ".join(f"{mean_closed(cell, one, m):.0%}" for m in ("perplexity", "kl")) for one in shared]
        counts = (
            " / ".join(count(cell, BOTH, m) for m in ("perplexity", "kl"))
            for count in (at_least_best, not_worse, among_best)
        )
        return [name, *means, *counts]

    return markdown(head, (row(*one) for one in cells))


def choices(data: Data, markdown: Markdown) -> str:
    """One model at one setting: what each method closes on other text than the calibration's, and on what follows it."""
    (cell,) = (cell for cells in data.values() for cell in cells.values())
    rest = [text for text in cell["traffic"] if text.startswith("rest of ")]
    other = [text for text in cell["traffic"] if text not in rest]

    def share(label: str, texts: list[str]) -> str:
        means = (sum(closed(cell, label, text, m) for text in texts) / len(texts) for m in ("perplexity", "kl"))
        return " / ".join(f"{mean:.0%}" for mean in means)

    rows = [[label, share(label, other), share(label, rest)] for label in labels(cell) if label != "rtn"]
    head = (
        "share of RTN's gap closed, perplexity / divergence",
        "other text, mean",
        "continuation of the calibration text",
    )
    return markdown(head, rows)


def peers(data: Data, markdown: Markdown, described: str) -> str:
    """Ours and other tools: perplexities, seconds, and how many times longer than ours the same method took.

    Where divergences were measured, their mean over the texts too.
    """
    results, s = data["results"], data["settings"]
    # the first blocks alone make no model
    texts = [] if s.get("blocks") else list(next(iter(results.values()))["perplexity"])
    if s.get("blocks"):
        results = {name: row for name, row in results.items() if name != "float"}
    diverge = ["mean KL"] if texts and all("divergence" in row or "error" in row for row in results.values()) else []
    rows = []
    for name, row in results.items():
        if "error" in row:
            rows.append([name, *([""] * len(texts + diverge)), "", row["error"]])
            continue
        same = results.get(SAME.get(name, ""))
        times = f"{row['seconds'] / same['seconds']:.1f}x" if same else ""
        cells = [f"{row['perplexity'][text]:.3f}" for text in texts]
        cells += [f"{sum(row['divergence'].values()) / len(texts):.4f}" for _ in diverge if name != "float"]
        cells += [""] * (len(texts + diverge) - len(cells))
        rows.append([name, *cells, f"{row['seconds']:.1f}" if row["seconds"] else "", times])
    part = f"the first {s['blocks']} blocks of " if s.get("blocks") else ""
    head = f"{part}{s['model']}, 4 bits, groups of {s['group_size']}, {s['samples']} x {s['seq']} tokens of calibration"
    head += f", scored on {s['tokens']} tokens of each text. {described}." if texts else f". {described}."
    return f"{head[0].upper()}{head[1:]}\n\n" + markdown(
        ("perplexity" if texts else "", *texts, *diverge, "seconds", "× awq_ext's time"), rows
    )


def heads(data: Data, markdown: Markdown) -> str:
    """What each output layer costs by itself, and behind blocks that AWQ quantized: means over texts."""
    floats = data["blocks"]["float"]["float"]

    def cost(blocks: str, label: str) -> list[str]:
        found = data["blocks"][blocks][label]
        kl = sum(one["kl"] for one in found.values()) / len(found)
        rise = sum(one["perplexity"] / floats[text]["perplexity"] - 1 for text, one in found.items()) / len(found)
        return [f"{kl:.4f}", f"{round(100 * rise, 1) + 0.0:+.1f} %"]  # + 0.0: no -0.0

    rows = [
        [label, f"{entry['bytes'] / 1e6:.1f}", *cost("float", label), *cost("awq", label)]
        for label, entry in data["heads"].items()
    ]
    head = ["output layer", "MB", "alone: KL", "perplexity", "behind int4 blocks: KL", "perplexity"]
    settings = data["settings"]
    told = f"{data['model']}, groups of {settings['group_size']}, {settings['tokens']} tokens of each of {len(floats)} texts."
    return f"\n{told}\n\n{markdown(head, rows)}"
