"""One sentence on a comparison, and the speeds that its table shows."""

from __future__ import annotations

import torch

from awq_ext.evaluation.bootstrap import Bootstrap, Measure
from awq_ext.evaluation.comparison import Comparison, Variant
from awq_ext.evaluation.evaluate import Evaluation
from awq_ext.evaluation.verdict import verdict


def scored(kl: float, noise: float, windows: int = 8) -> Evaluation:
    counts = torch.full((windows,), 10.0, dtype=torch.float64)
    spread = torch.linspace(-noise, noise, windows, dtype=torch.float64)
    if int(kl * 1000) % 2:
        spread = spread.flip(0)
    return Evaluation(
        {"kl": Measure((kl + spread) * counts, counts)}, Bootstrap(resamples=200), windows, 10 * windows, 0.0
    )


def comparison(noise: float = 0.0, windows: int = 8, **losses: tuple[float, float]) -> Comparison:
    rows = [Variant("float", None, 1000, evaluations={name: scored(0.0, 0.0, windows) for name in ("code", "prose")})]
    for number, (label, both) in enumerate(losses.items()):
        found = {name: scored(loss, noise, windows) for name, loss in zip(("code", "prose"), both, strict=True)}
        rows.append(Variant(label, {"bits": 4}, 250, seconds=float(number), evaluations=found))
    return Comparison(rows, ["code", "prose"], 1, Bootstrap(resamples=200))


def test_the_best_everywhere_is_taken() -> None:
    found = verdict(comparison(rtn=(0.3, 0.4), awq=(0.1, 0.2)))
    assert found.label == "awq" and found.text.startswith(
        "Take awq (25% of the float model's size): on no text is another"
    )


def test_of_several_that_do_not_differ_the_quickest_is_taken() -> None:
    found = verdict(comparison(noise=0.1, rtn=(0.100, 0.101), awq=(0.101, 0.100)))
    assert found.label == "rtn" and "not significantly different" in found.text and "the others: awq" in found.text


def test_on_little_text_the_quickest_is_not_taken_for_the_noise() -> None:
    losses = {"rtn": (0.110, 0.111), "awq": (0.101, 0.100)}
    found = verdict(comparison(noise=0.1, windows=2, **losses))
    assert found.label == "awq" and "2 windows of text cannot tell it from rtn: score on more" in found.text
    assert verdict(comparison(noise=0.1, windows=6, **losses)).label == "rtn"


def test_where_none_is_best_everywhere_the_mean_decides() -> None:
    found = verdict(comparison(rtn=(0.1, 0.9), awq=(0.3, 0.2)))
    assert found.label == "awq" and "(rtn on code, awq on prose)" in found.text and "on average" in found.text
    assert verdict(comparison(rtn=(0.3, 0.2), awq=(0.1, 0.9))).label == "rtn"


def test_one_method_alone_is_not_called_the_best() -> None:
    assert verdict(comparison(rtn=(0.1, 0.9))).text.startswith("Only rtn (25% of the float model's size) was tried")


def test_speeds_and_their_ratio_agree() -> None:
    """A row's ratio is that of the figures that it shows, or of its speed and the float row's."""
    rows = list(comparison(rtn=(0.3, 0.4), awq=(0.1, 0.2)).rows)
    speeds = [(702.0, 702.0), (167.0, 557.0), (351.0, 702.0)]
    rows = [Variant(**{**vars(row), "speeds": {"windows": pair}}) for row, pair in zip(rows, speeds, strict=True)]
    found = Comparison(rows, ["code", "prose"], 1, Bootstrap(resamples=200))
    shown = [[cell.text for cell in row][-2:] for row in found.tables()[0].rows]
    assert shown == [["702", ""], ["167", "0.30 of 557"], ["351", "0.50"]]
    assert any("of N: the float model ran at N tokens/s" in line for line in found.notes())
    alone = Comparison([rows[0], rows[2]], ["code", "prose"], 1, Bootstrap(resamples=200))
    assert not any("of N" in line for line in alone.notes())
