"""The row of weights in the demo: what its figures are, computed here another way."""

from __future__ import annotations

import pytest
import torch

from awq_ext.demo import theory


def grid_errors(weights: list[float], scale: list[float], bits: int) -> list[float]:
    """Round to the nearest value of one asymmetric grid over all weights, in Python's floats."""
    scaled = [w * s for w, s in zip(weights, scale, strict=True)]
    low, high = min(0.0, *scaled), max(0.0, *scaled)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    stored = [(min(max(round(w / step) + zero, 0), 2**bits - 1) - zero) * step for w in scaled]
    return [abs(q / s - w) for q, s, w in zip(stored, scale, weights, strict=True)]


def test_errors_are_those_of_rounding_to_the_nearest_value() -> None:
    found = theory.example()
    for rounded, scale in ((found.rtn, [1.0] * len(theory.WEIGHTS)), (found.awq, found.scale.tolist())):
        expected = grid_errors(list(theory.WEIGHTS), scale, theory.BITS)
        # the package stores the step in fp16: 2^-11 of a code of at most 7 steps, on weights of at most 1.1 before scaling
        assert rounded.errors.tolist() == pytest.approx(expected, abs=2e-3)
        assert rounded.costs.tolist() == pytest.approx(
            [e * x for e, x in zip(rounded.errors.tolist(), theory.ACTIVATIONS, strict=True)]
        )
        assert rounded.total == pytest.approx(sum(rounded.costs.tolist()))


def test_the_row_shows_what_it_is_there_for() -> None:
    """The smaller error costs more, and the search protects the loud channel."""
    found = theory.example()
    loud, quiet = found.loud, found.quiet
    assert found.activations[loud] == max(theory.ACTIVATIONS) and quiet != loud
    assert found.rtn.errors[loud] < found.rtn.errors[quiet] and found.rtn.costs[loud] > found.rtn.costs[quiet]
    assert found.scale[loud] > 1 and found.awq.total < found.rtn.total


def test_equal_activations_leave_the_loud_channel_unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "ACTIVATIONS", (1.0,) * len(theory.WEIGHTS))
    monkeypatch.setattr(theory, "WEIGHTS", tuple(torch.linspace(-3, 4, 8).tolist()))  # all on the grid of 3 bits
    found = theory.example()
    assert found.rtn.total < 1e-5 and torch.equal(found.scale, torch.ones(8))
