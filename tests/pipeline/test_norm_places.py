"""Norms behind the Linears instead of before them: AWQ beats RTN in the whole model as far as its layers' losses say."""

from __future__ import annotations

from functools import cache

import pytest
from norm_places import BEHIND, Ratio, make, ratio, summary
from torch import nn

pytest.importorskip("transformers", reason="norms behind Linears NOT TESTED: pip install 'awq-ext[hf]'")

SEEDS = 6  # one model alone scatters by 0.03 to 0.1 (docs/research.md)


@cache
def ratios(family: str, weights: str) -> list[Ratio]:
    return [ratio(family, weights, 64, seed) for seed in range(SEEDS)]


def gains(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 1]


@pytest.mark.parametrize("family", BEHIND)
def test_the_models_have_norms_behind_their_linears(family: str) -> None:
    model = make(family, "flat", 64, 0)
    names = {name for name, _ in model.named_modules()}
    assert "model.layers.0.post_feedforward_layernorm" in names and "model.layers.0.input_layernorm" not in names
    assert gains(model) and all((gain == 1).all() for gain in gains(model))
    assert any((gain != 1).any() for gain in gains(make(family, "loud", 64, 0)))


@pytest.mark.parametrize("family", BEHIND)
def test_with_equal_gains_the_place_of_a_norm_does_not_matter(family: str) -> None:
    before, behind = summary(ratios("Llama", "flat")), summary(ratios(family, "flat"))
    assert max(one.model for one in ratios(family, "flat")) < 1
    # both means scatter by 0.015; a measure that were wrong behind a norm would bring this one to 1
    assert abs(behind["mean"] - before["mean"]) < 0.06
    assert abs(behind["mean"] - behind["layers"]) < 0.07


@pytest.mark.parametrize("family", BEHIND)
def test_loud_gains_help_where_they_stand_before_the_linears(family: str) -> None:
    before, behind = summary(ratios("Llama", "loud")), summary(ratios(family, "loud"))
    assert behind["mean"] < 0.95
    assert before["mean"] < behind["mean"] - 0.05 and before["layers"] < behind["layers"] - 0.05
