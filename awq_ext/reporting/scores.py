"""Scores of a quantized model on texts, as plain values in its report and as rows of its card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# what evaluate() calls its measures -> how a card says it
_MEASURES = {"kl": "KL divergence {} nats a token", "top1": "same likeliest token {}", "perplexity": "perplexity {}"}
# nats a token: a model of 135 M parameters loses 0.03 to 0.3 at 4 bits by AWQ and better methods, up to 0.6 by plain rounding, and
# by that 1 to 1.5 at 3 bits (docs/methods.md)
USUAL, LARGE = 0.3, 0.5
_ROW = re.compile(r"^\| (scores on .*|divergence) \|[^\n]*\n", re.MULTILINE)

Scores = dict[str, dict[str, Any]]


def plain_scores(evaluations: Mapping[str, Any] | None) -> Scores:
    """Turn evaluations by the name of their text (objects with ``to_dict()``, or what that gave) to plain values.

    TypeError for anything else.
    """
    if evaluations is None:
        return {}
    if not isinstance(evaluations, Mapping):
        raise TypeError(_wanted(evaluations))
    found = {str(name): one.to_dict() if hasattr(one, "to_dict") else one for name, one in evaluations.items()}
    for one in found.values():
        if not isinstance(one, Mapping) or not measures_of(one):
            raise TypeError(_wanted(one))
    return {name: dict(one) for name, one in found.items()}


def _wanted(given: object) -> str:
    return (
        f"evaluations: a {type(given).__name__} was given, evaluations by the name of their text are needed, such as "
        '{"code": awq_ext.evaluate(model, windows, reference=float_model)}'
    )


def measures_of(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Pick the measures from one evaluation, each {"value", "low", "high"}: divergence, top-1 and perplexity first."""
    found = {name: one for name, one in scores.items() if isinstance(one, Mapping) and "value" in one}
    return {
        name: found[name] for name in (*(n for n in _MEASURES if n in found), *(n for n in found if n not in _MEASURES))
    }


def score_facts(scores: Scores, base: str) -> Iterable[tuple[str, str]]:
    """Say the scores, a text a row; where none compares with the float model, by which command that is measured."""
    for name, one in scores.items():
        said = [
            _MEASURES.get(measure, f"{measure} {{}}").format(_shown(value))
            for measure, value in measures_of(one).items()
        ]
        tokens = [f"{one['tokens']:,} scored"] if isinstance(one.get("tokens"), int) else []
        yield f"scores on {' '.join(name.replace('|', '/').split())}", "; ".join([*said, *tokens])
    if not any("kl" in one for one in scores.values()):
        command = f"awq-ext eval DIRECTORY TEXT.txt --reference {base or 'FLOAT_MODEL'} --card"
        yield "divergence", f"from the float model: not measured, which this does: `{command}`"


def _shown(estimate: Mapping[str, Any]) -> str:
    value, low, high = (estimate.get(name) for name in ("value", "low", "high"))
    if value is None:
        return "unknown"
    return f"{value:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")


def table_rows(facts: Iterable[tuple[str, str]]) -> str:
    """Write rows of a Markdown table of two columns, a line each."""
    return "".join(f"| {name} | {value} |\n" for name, value in facts)


def with_scores(card: str, scores: Scores) -> str:
    """Exchange the rows about scores of a card's text; a text without such rows stays as it is."""
    first = _ROW.search(card)
    if first is None or not scores:
        return card
    rest = _ROW.sub("", card[first.end() :])
    return card[: first.start()] + table_rows(score_facts(scores, "")) + rest
