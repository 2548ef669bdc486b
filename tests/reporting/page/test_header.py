"""The top of the page: a verdict by what was measured, figures with their units, and what to mind."""

from __future__ import annotations

from typing import Any

import pytest

from awq_ext import AwqReport, LayerReport
from awq_ext.reporting.page import header


def score(value: float | None, half: float | None = None, **more: Any) -> dict[str, Any]:
    known = value is not None and half is not None
    kl = {"value": value, "low": value - half if known else None, "high": value + half if known else None}
    return {"kl": kl, "top1": {"value": 0.75, "low": 0.7, "high": 0.8}, "tokens": 100, **more}


def report(**fields: Any) -> AwqReport:
    layer = LayerReport(
        "h.0.q", 64, 32, "int4", method="awq", bits=4, group_size=64, loss=1.0, loss_rtn=4.0, tokens=500
    )
    return AwqReport(**{"layers": [layer], "bytes_before": 1000, "bytes_after": 250} | fields)


@pytest.mark.parametrize(
    ("evaluations", "level", "words"),
    [
        ({}, "fair", ["at 25% of its size", "25% of plain rounding's output error", "not measured"]),
        ({"a": score(0.125, 0.01), "code": score(0.25, 0.05)}, "good", ["0.25 ± 0.05 nats a token on code", "worst", "75%"]),
        ({"a": score(0.3)}, "good", ["0.3 nats a token on a (less than 0.3"]),
        ({"a": score(0.5)}, "fair", ["Farther", "0.5 nats a token on a, where less than 0.3"]),
        ({"a": score(0.75)}, "bad", ["Far from the float model", "0.75 nats"]),
        ({"a": score(0.125), "code": score(None)}, "bad", ["Do not use it", "on code"]),
    ],
)  # fmt: skip
def test_the_verdict(evaluations: dict[str, Any], level: str, words: list[str]) -> None:
    found = header.verdict(report(evaluations=evaluations))
    assert found.level == level and all(word in found.text for word in words), found.text
    assert found.text.count(". ") == 0 and found.text.endswith(".")


def test_texts_are_compared_by_their_intervals() -> None:
    said = header.between_texts(
        report(evaluations={"a": score(0.1, 0.02), "b": score(0.11, 0.02), "c": score(0.2, 0.02)})
    )
    assert (
        "significantly larger on c and not significantly different on b (at 5 %" in said and "Compared with a," in said
    )
    # the difference is 0.028 with a standard error of 0.0144: just not; each interval alone would say so of 0.02 to 0.04 only
    assert "larger" not in header.between_texts(report(evaluations={"a": score(0.1, 0.02), "b": score(0.128, 0.02)}))
    assert "larger on b" in header.between_texts(report(evaluations={"a": score(0.1, 0.02), "b": score(0.13, 0.02)}))
    assert header.between_texts(report(evaluations={"a": score(0.1, 0.02), "b": score(0.13)})) == ""


def test_facts_that_are_known() -> None:
    full = report(
        model="a/b", parameters=1234, date="2025-01-02T03:04:05+00:00", versions={"awq_ext": "1", "torch": "2"}
    )
    assert header.facts(full) == [
        ("model", "a/b (1,234 parameters)"),
        ("size", "1000 B → 250 B (1,000 → 250 bytes, 25.0%)"),
        ("date", "2025-01-02 03:04:05 UTC"),
        ("versions", "awq_ext 1, torch 2"),
    ]
    assert header.facts(AwqReport()) == []


def tile(found: AwqReport, what: str) -> header.Tile:
    return next(one for one in header.tiles(found) if one.what == what)


def test_bits_count_scales_and_zeros() -> None:
    # 16 + 4 bits to 64 weights, and 16 + 8 to 32
    assert tile(report(), "bits a weight").value == "4.31"
    wide = LayerReport("h.0.k", 64, 32, "int8", bits=8, group_size=32)
    mixed = tile(report(layers=[*report().layers, wide]), "bits a weight")
    assert mixed.value == f"{(4 + 20 / 64 + 8 + 24 / 32) / 2:.2f}" and mixed.more.startswith("codes of 4 and 8")


def test_the_size_and_the_divergence() -> None:
    assert tile(report(), "of the size") == header.Tile("of the size", "25.0%", "4.00 times smaller")
    assert tile(report(), "KL, nats a token").level == "warn"
    found = tile(report(evaluations={"a": score(0.7, 0.1), "b": score(0.2)}), "KL, nats a token")
    assert (found.value, found.more, found.level) == ("0.7 ± 0.1", "on a, the worst of 2", "bad")
    assert tile(report(evaluations={"a": score(None)}), "KL, nats a token").value == "not finite"
    assert "of the size" not in [one.what for one in header.tiles(AwqReport())]


def test_few_calibration_tokens_are_a_warning() -> None:
    few, enough = report(calibration_tokens=1024), report(calibration_tokens=4000)
    assert tile(few, "calibration tokens seen").level == "warn"
    assert [text for text, _ in header.warnings(few)] == [
        few.few_tokens
    ] and "1,024 calibration tokens are few" in few.few_tokens
    assert tile(enough, "calibration tokens seen").level == "" and header.warnings(enough) == []
    # layers of other models see rows, of which fewer may be enough
    assert tile(report(), "calibration tokens seen").level == ""


@pytest.mark.parametrize(
    ("config", "weighted"),
    [
        ({"method": "awq"}, False),
        ({"method": "awq+gptq", "objective": None}, True),
        ({"method": "awq", "objective": "model"}, True),
        ({"method": "gptq", "objective": "layer"}, False),
        ({"method": "awq", "per_layer": {"*.k": {"method": "gptq"}}}, True),
    ],
)
def test_when_losses_are_importance_weighted(config: dict[str, Any], weighted: bool) -> None:
    assert header.importance_weighted(report(config=config)) is weighted
