"""Sum up a comparison in one sentence: which method to take, all evaluation texts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .comparison import FLOAT, Comparison, Variant

# Of fewer windows a bootstrap's interval says little: on SmolLM2 even plain rounding may then not be significantly different.
FEW_WINDOWS = 6


@dataclass(frozen=True)
class Verdict:
    """label: the method to take; text: why, in a sentence."""

    label: str
    text: str


def verdict(found: Comparison) -> Verdict:
    """Choose the method that none beats significantly on any evaluation text; else the one that loses least on average.

    Of several, the smallest, then the one that took least time; but where all texts are shorter than ``FEW_WINDOWS`` windows, the
    one that loses least. Goes by the KL divergence from the float model, which needs fewer windows than perplexity to show a
    difference; for models without next-token logits, by the first measure.
    """
    measure = "kl" if "kl" in found.measures else found.measures[0]
    by = "KL divergence from the float model" if measure == "kl" else measure
    done = [row for row in found.rows[1:] if not row.error]
    leaders = {name: found.best(name, measure) for name in found.traffic}
    unbeaten = [row for row in done if all(row.label in labels for labels in leaders.values())]
    if len(done) == 1:
        return Verdict(
            done[0].label, f"Only {_cost(done[0], found)} was tried: name others with --method to compare it."
        )
    if not unbeaten:
        taken = min(done, key=lambda row: _mean_loss(row, found, measure))
        each = ", ".join(f"{labels[0]} on {name}" for name, labels in leaders.items())
        return Verdict(
            taken.label,
            f"No method is best on every text ({each}): {_cost(taken, found)} loses least on average, by {by}.",
        )
    windows = max(one.windows for row in unbeaten for one in row.evaluations.values())
    if len(unbeaten) > 1 and windows < FEW_WINDOWS:
        taken = min(unbeaten, key=lambda row: _mean_loss(row, found, measure))
        return Verdict(
            taken.label,
            f"{_cost(taken, found)} loses least, by {by}, but {_windows(windows)} of text cannot tell it from "
            f"{_others(unbeaten, taken)}: score on more (--tokens, or longer texts).",
        )
    taken = min(unbeaten, key=lambda row: (row.size_bytes, row.seconds or 0.0))
    if len(unbeaten) == 1:
        return Verdict(taken.label, f"Take {_cost(taken, found)}: on no text is another significantly better, by {by}.")
    return Verdict(
        taken.label,
        f"Take {_cost(taken, found)}, the cheapest of those that are not significantly different, by {by} "
        f"(the others: {_others(unbeaten, taken)}).",
    )


def _others(rows: Sequence[Variant], taken: Variant) -> str:
    return ", ".join(row.label for row in rows if row is not taken)


def _windows(count: int) -> str:
    return f"{count} window{'s' * (count != 1)}"


def _cost(row: Variant, found: Comparison) -> str:
    return f"{row.label} ({row.size_bytes / found[FLOAT].size_bytes:.0%} of the float model's size)"


def _mean_loss(row: Variant, found: Comparison, measure: str) -> float:
    """Average how much worse than the best a method is, over evaluation texts."""

    def value(one: Variant, name: str) -> float:
        return one.evaluations[name].measures[measure].value

    best = {name: found[found.best(name, measure)[0]] for name in found.traffic}
    return fmean(abs(value(row, name) - value(best[name], name)) for name in found.traffic)
