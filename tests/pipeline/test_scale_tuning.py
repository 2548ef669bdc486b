"""quantize(tune_scales=): packed and fake-quantized layers, models that cannot be tuned, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import Snapshot
from readers import Reader, batches
from torch import Tensor, nn

import awq_ext
from awq_ext.layers.quant_linear import QuantLinear
from awq_ext.tuning import scales

FAST = {"method": "awq", "group_size": 16, "progress": False}


def divergence(model: nn.Module) -> float:
    """Mean KL divergence from the float model on tokens of other windows."""
    return awq_ext.evaluate(model, batches(20)[9:], reference=Reader())["kl"].value


@pytest.mark.parametrize("settings", [{}, {"bits": 3, "packed": False}, {"packed": False}, {"head": "int4"}])
def test_tuned_layers_are_closer_to_the_float_model(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(scales, "RATE", 1e-2)
    plain = awq_ext.quantize(Reader(), batches(), **FAST, **settings)
    tuned = awq_ext.quantize(Reader(), batches(), tune_scales=4, **FAST, **settings)
    assert divergence(tuned) < 0.9 * divergence(plain)
    assert any(note.startswith("scales of weight groups tuned (8 batches;") for note in tuned.awq_report.notes)
    assert tuned.awq_report.tuning_seconds > 0
    assert plain.awq_report.tuning_seconds == 0
    for (name, one), other in zip(plain.named_modules(), tuned.modules(), strict=True):
        assert type(one) is type(other)
        if isinstance(one, QuantLinear):
            assert torch.equal(one.qweight, other.qweight), name
            assert torch.equal(one.zeros, other.zeros), name


def test_scales_divided_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "RATE", 1e-2)
    settings = {**FAST, "fold": "never"}
    plain, tuned = (awq_ext.quantize(Reader(), batches(), tune_scales=n, **settings) for n in (0, 4))
    assert any(module.pre_quant_scale is not None for module in tuned.modules() if isinstance(module, QuantLinear))
    assert divergence(tuned) < divergence(plain)


class Pooled(Reader):
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids).mean(1)


class Closed(Reader):
    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids)


@pytest.mark.parametrize("cls, reason", [(Pooled, "no logits"), (Closed, "do not depend on any scale")])
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_cannot_be_tuned_is_quantized_with_a_note(cls: Any, reason: str, packed: bool) -> None:
    model, other = (awq_ext.quantize(cls(), batches(), tune_scales=n, packed=packed, **FAST) for n in (1, 0))
    (note,) = [note for note in model.awq_report.notes if "not tuned" in note]
    assert reason in note
    for key, value in model.state_dict().items():
        # a fake-quantized weight is multiplied by 1/s, rounded to fp32, where it is divided by s without tuning: two roundings
        assert torch.equal(value, other.state_dict()[key]) or not packed
        torch.testing.assert_close(value, other.state_dict()[key], rtol=2 * 2**-23, atol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_an_interrupt_while_tuning_leaves_the_float_model(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scales._Steps, "take", stop)
    model = Reader()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        awq_ext.quantize(model, batches(), tune_scales=1, packed=packed, **FAST)
    before.assert_unchanged()


def test_the_plan_counts_predictions_and_scales() -> None:
    """512 tokens at most with a log-probability each, and eight numbers for each scale."""
    plans = [
        awq_ext.plan(Reader(), batches(1)[0], batches=n, tune_scales=1, group_size=16).planned_memory_bytes
        - awq_ext.plan(Reader(), batches(1)[0], batches=n, group_size=16).planned_memory_bytes
        for n in (1, 5)
    ]
    groups = 2 * (48 * 2 + 32 * 3)
    assert plans[0] == 20 * 512 * 8 + 26 * groups
    assert plans[1] - plans[0] == 4 * 20 * 512 * 8


def test_the_setting() -> None:
    assert awq_ext.AwqConfig().tune_scales == 0
    with pytest.raises(ValueError, match=r"AwqConfig[.]tune_scales=-1: at least 0"):
        awq_ext.AwqConfig(tune_scales=-1)
    with pytest.raises(TypeError, match=r"AwqConfig[.]tune_scales=True: an int"):
        awq_ext.AwqConfig(tune_scales=True)
