"""What the demo measures, and what it says of its figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from programs import run_python

import awq_ext
from awq_ext.demo import data, display, run
from awq_ext.demo.model import load_demo_model
from awq_ext.evaluation.bootstrap import Bootstrap, Measure
from awq_ext.evaluation.comparison import FLOAT, Comparison, Variant
from awq_ext.evaluation.cost import model_bytes
from awq_ext.evaluation.evaluate import Evaluation


def scored(label: str, losses: list[float]) -> Variant:
    """A row of the comparison, from the mean loss of each window in nats a byte."""
    totals = torch.tensor(losses, dtype=torch.float64)
    measure = Measure(totals, torch.ones_like(totals), torch.exp)
    evaluation = Evaluation({"perplexity": measure}, Bootstrap(resamples=500), len(losses), len(losses), 0.1)
    return Variant(label, None if label == FLOAT else run.METHODS[label], evaluations={run.TEXT: evaluation})


def compared(**losses: list[float]) -> Comparison:
    """RTN and AWQ of 4 bits (and the same as 3 bits) beside the float model."""
    rows = [scored(FLOAT, losses["float"])]
    rows += [scored(f"{m.upper()} {bits} bit", losses[m]) for bits in run.BITS for m in ("rtn", "awq")]
    return Comparison(rows, [run.TEXT], 1, Bootstrap(resamples=500))


def test_float_size_is_two_bytes_a_parameter() -> None:
    trained = load_demo_model(torch.float32)
    assert model_bytes(trained, run.BYTES_PER_FLOAT) == 2 * sum(p.numel() for p in trained.parameters())


OF_FLOAT = [1.0, 1.2, 1.4]


@pytest.mark.parametrize(
    "rtn, awq, says",
    [
        ([1.2, 1.41, 1.6], [1.1, 1.3, 1.5], "AWQ closes"),
        ([1.1, 1.3, 1.5], [1.2, 1.41, 1.6], "AWQ is worse than RTN here"),
        ([1.1, 1.3, 1.5], [1.0, 1.4, 1.5], "less than the noise"),
        ([0.9, 1.3, 1.4], [0.8, 1.4, 1.4], "AWQ does not differ from it measurably either"),
        ([0.9, 1.3, 1.4], [1.0, 1.41, 1.5], "AWQ is worse by"),
        ([0.9, 1.3, 1.4], [0.8, 1.19, 1.3], "AWQ is better by"),
        ([1.2], [1.1], "RTN costs nothing that this many bytes can show"),
    ],
)
def test_verdict_says_what_the_figures_say(rtn: list[float], awq: list[float], says: str) -> None:
    found = compared(float=OF_FLOAT[: len(rtn)], rtn=rtn, awq=awq)
    assert says in display.verdict(found, 4)
    result = run.DemoResult(found, {row.label: b"abc" for row in found.rows}, -1, 1.0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_gap_closed_is_of_the_printed_perplexities() -> None:
    found = compared(**{name: [math.log(p)] * 2 for name, p in {"float": 1.0, "rtn": 3.0, "awq": 2.0}.items()})
    result = run.DemoResult(found, {row.label: b"" for row in found.rows}, -1, 1.0)
    assert result.to_dict()["gap_closed"] == pytest.approx({"4_bit": 0.5, "3_bit": 0.5})
    assert "closes [green]50%[/green]" in display.verdict(found, 3) and "(3.0000 against 2.0000)" in display.verdict(
        found, 3
    )


def test_a_method_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(float=OF_FLOAT, rtn=OF_FLOAT, awq=OF_FLOAT)
    failed = replace(found, rows=[*found.rows[:-1], replace(found.rows[-1], error="ValueError: no luck")])
    monkeypatch.setattr(run, "compare", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="AWQ 3 bit: ValueError: no luck"):
        run.run_demo(tokens=256)


def test_completion_bytes_cannot_control_the_terminal() -> None:
    assert display.printable(b"a\x1b[31m\n\xff\0") == "a·[31m\n\N{REPLACEMENT CHARACTER}·"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The demo end to end, as a user starts it."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    # one thread: several are many times slower where other programs keep the cores busy
    done = run_python("-m", "awq_ext", "demo", "--tokens", "2048", "--threads", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "How to read it" in done.stdout and "perplexity" in done.stdout
    return json.loads(path.read_text(encoding="utf-8")) | {"stdout": done.stdout}


def test_demo_figures_are_finite(figures: dict) -> None:
    rows = figures["rows"]
    assert [r["label"] for r in rows] == ["float", "RTN 4 bit", "AWQ 4 bit", "RTN 3 bit", "AWQ 3 bit"]
    for r in rows:
        perplexity = r["evaluations"]["held-out"]["perplexity"]["value"]
        assert math.isfinite(perplexity) and perplexity > 1
        assert f"{perplexity:.3f}" in figures["stdout"]
        assert r["seconds"] is None or r["seconds"] > 0
        assert r["completion"]
    for r in rows[:3]:
        assert all(r["speeds"][kind]["tokens_per_second"] > 0 for kind in ("windows", "steps"))
    assert not rows[3]["speeds"] and not rows[4]["speeds"] and figures["threads"] == 1
    assert rows[0]["size_bytes"] > rows[2]["size_bytes"] > rows[4]["size_bytes"]
    # each verdict prints the perplexities it compares to one digit more
    for r in rows[1:]:
        assert f"{r['evaluations']['held-out']['perplexity']['value']:.4f}" in figures["stdout"]


def test_awq_at_three_bits_is_not_worse_than_rtn(figures: dict) -> None:
    assert figures["rtn_minus_awq"]["3_bit"]["high"] > 0


def test_size_formula_agrees_with_packed_layers() -> None:
    """What is printed for simulated widths is what QuantLinear takes where both exist: at 4 bits."""
    sizes = []
    for packed in (True, False):
        batches = data.calibration_batches(count=1, batch=2)
        model = load_demo_model(torch.float32)
        sizes.append(
            model_bytes(
                awq_ext.quantize(model, batches, progress=False, method="rtn", packed=packed), run.BYTES_PER_FLOAT
            )
        )
    assert sizes[0] == sizes[1]
