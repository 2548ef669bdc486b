"""Scales tuned end to end: the divergence falls, codes stay, and nothing is left behind where it does not work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from readers import Reader, batches
from torch import Tensor, nn

import awq_ext
from awq_ext.forwards.calls import CalibrationError, Call
from awq_ext.layers.quant_linear import QuantLinear
from awq_ext.tuning import scales
from awq_ext.tuning.predictions import Predictions
from awq_ext.tuning.scales import float_predictions, tune_scales

FAST = {"method": "rtn", "group_size": 16, "progress": False}


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[QuantLinear], list[tuple[Call, Predictions]]]:
    """A model rounded to nearest, its layers, and batches with what the float model says of them."""
    model = Reader(dtype)
    calls = [Call((ids,)) for ids in batches()]
    expected = float_predictions(model, calls)
    awq_ext.quantize(model, batches(), **FAST)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return model, layers, list(zip(calls, expected, strict=True))


def state(layers: list[QuantLinear]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(layer.tiles.clone(), layer.tile_scales.clone(), layer.tile_zeros.clone()) for layer in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_falls_on_what_took_no_part(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(scales, "RATE", 1e-2)
    model, layers, given = made(dtype)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    before = state(layers)
    tuning = tune_scales(model, list(model.layers), layers, given, passes=4)
    assert tuning.kept
    assert tuning.after < 0.8 * tuning.before
    assert (tuning.batches, tuning.held) == (8, 1)
    for layer, (tiles, old, zeros) in zip(layers, before, strict=True):
        assert torch.equal(layer.tiles, tiles)
        assert torch.equal(layer.tile_zeros, zeros)
        assert not torch.equal(layer.tile_scales, old)
        assert layer.tile_scales.dtype == old.dtype
        assert not layer.tile_scales.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert not any("forward" in vars(module) for module in model.modules())


def test_passes_agree_whatever_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model, layers, given = made()
            tune_scales(model, list(model.layers), layers, given, passes=1)
            found.append(state(layers))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        # torch's own products may differ in their last bits; steps of 1e-3 must not show it
        torch.testing.assert_close(one[1].float(), other[1].float(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("rate, expected", [(2e-3, 2.0), (8e-2, 0.5)])
def test_the_held_out_batches_choose_how_far_to_go(
    monkeypatch: pytest.MonkeyPatch, rate: float, expected: float
) -> None:
    """Steps that are too small are made longer, those that are too large shorter."""
    monkeypatch.setattr(scales, "RATE", rate)
    model, layers, given = made()
    tuning = tune_scales(model, list(model.layers), layers, given, passes=2)
    chosen = state(layers)
    monkeypatch.setattr(scales, "LENGTHS", ())
    other, layers, given = made()
    plain = tune_scales(other, list(other.layers), layers, given, passes=2)
    assert tuning.after < plain.after
    assert tuning.before == plain.before
    if plain.kept:
        start = state(made()[1])
        for (_, new, _), layer, (_, old, _) in zip(chosen, layers, start, strict=True):
            filled = old > 0
            ratio = (new[filled].float() / old[filled].float()).log() / (
                layer.tile_scales[filled] / old[filled]
            ).float().log()
            assert float(ratio[ratio.isfinite()].median()) == pytest.approx(expected, rel=0.05)


def test_scales_that_gain_nothing_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, given = made()
    monkeypatch.setattr(scales, "RATE", 3.0)
    before = state(layers)
    tuning = tune_scales(model, list(model.layers), layers, given, passes=1)
    assert not tuning.kept
    assert tuning.after >= tuning.before
    for layer, (_, old, _) in zip(layers, before, strict=True):
        assert torch.equal(layer.tile_scales, old)


def test_an_interrupt_or_an_error_leaves_the_old_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, given = made()
    before, seen = state(layers), 0

    def stop(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(scales._Steps, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        tune_scales(model, list(model.layers), layers, given, passes=1)
    for layer, (_, old, _) in zip(layers, before, strict=True):
        assert layer.tile_scales.data_ptr() == old.data_ptr() or torch.equal(layer.tile_scales, old)
        assert not layer.tile_scales.requires_grad
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_step_that_is_no_number_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, given = made()
    monkeypatch.setattr(scales._Scales, "gradients", lambda self: [torch.full_like(t, torch.nan) for t in self.thetas])
    before = state(layers)
    tuning = tune_scales(model, list(model.layers), layers, given, passes=1)
    assert tuning.after == tuning.before
    assert all(torch.equal(layer.tile_scales, old) for layer, (_, old, _) in zip(layers, before, strict=True))


def test_layers_that_do_not_run_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, given = made()
    idle = copy.deepcopy(layers[0])
    old = idle.tile_scales.clone()
    assert tune_scales(model, list(model.layers), [*layers, idle], given, passes=1).held == 1
    assert torch.equal(idle.tile_scales, old)


class Closed(Reader):
    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids)


class Pooled(Reader):
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids).mean(1)


def test_models_that_cannot_be_tuned_are_errors() -> None:
    calls = [Call((ids,)) for ids in batches(2)]
    with pytest.raises(CalibrationError, match="no logits for every token id"):
        float_predictions(Pooled(), calls)
    broken = Reader()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        float_predictions(broken, calls)
    closed = Closed()
    given = list(zip(calls, float_predictions(closed, calls), strict=True))
    awq_ext.quantize(closed, batches(2), **FAST)
    layers = [module for module in closed.modules() if isinstance(module, QuantLinear)]
    with pytest.raises(CalibrationError, match=r"do not depend on any scale.*tune_scales=0"):
        tune_scales(closed, list(closed.layers), layers, given, passes=1)
    with pytest.raises(CalibrationError, match="needs two at least"):
        tune_scales(closed, list(closed.layers), layers, given[:1], passes=1)
