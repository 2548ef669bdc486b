"""What a fold changes: which parameters, by which factors, and which scales it can take."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

from awq_ext.folding.fold import LinearFold, NormFold
from awq_ext.forwards.probe import combined

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "offset"])
def test_the_effective_scale_is_what_the_norm_divides_by(kind: str, dtype: torch.dtype) -> None:
    """old gain / new gain = effective scale, to the fp32 roundings on the way: of 1 + w twice, of the division, 2^-24 each.

    1 + w is rounded relative to 1, not to a gain far below it.
    """
    norm = models.Norm(1000, offset=kind == "offset").to(dtype)
    scale = torch.rand(1000) * 4 + 0.25
    fold = NormFold(norm, kind)
    offset = float(kind == "offset")
    old = norm.weight.detach().double() + offset
    new = combined(fold.changes(scale))[norm, "weight"]
    assert new.dtype == dtype
    effective = fold.effective_scale(scale)
    allowed = (old.abs() + offset * (1 + effective)) * 2.0**-23
    assert torch.all((effective.double() * (new.double() + offset) - old).abs() <= allowed)
    # rounding the new weight moved the scale by at most half an ulp of the weight (offset: of w, seen from 1 + w)
    spread = new.double().abs() if kind == "offset" else old.abs() / scale
    slack = torch.finfo(dtype).eps / 2 * spread / (old.abs() / scale) + 2.0**-21
    assert torch.all((effective / scale - 1).abs() <= slack * 1.01)
    if dtype != torch.float32:
        assert not torch.equal(effective, scale), "a rounded weight must show"


@pytest.mark.parametrize("kind", ["plain", "offset"])
def test_unusable_gains_keep_the_wanted_scale(kind: str) -> None:
    norm = models.Norm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1e-7, 1.0, 2.0]) - float(kind == "offset"))
    norm.to(torch.float16)
    scale = torch.tensor([3.0, 3.0, 3.0, 3.0])
    effective = NormFold(norm, kind).effective_scale(scale)
    assert torch.isfinite(effective).all()
    assert effective[0] == 3
    # 1/3 and 2/3 in fp16, and 1/3 - 1: half an ulp of at most 2^-11
    assert torch.all((effective[2:] / 3 - 1).abs() < 2.0**-9)


def test_the_bias_is_divided_too() -> None:
    norm = models.layer_norm()
    scale = torch.rand(models.HIDDEN) + 0.5
    divided = combined(NormFold(norm, "plain").changes(scale))
    assert torch.equal(divided[norm, "bias"], norm.bias.detach() / scale)
    assert torch.equal(divided[norm, "weight"], norm.weight.detach() / scale)


def test_readers_of_a_norm_make_up_for_it() -> None:
    norm, router = nn.RMSNorm(4), nn.Linear(4, 3)
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5])
    changed = combined(NormFold(norm, "plain", readers=((router, "weight"),)).changes(scale))
    assert torch.equal(changed[router, "weight"], router.weight.detach() * scale)
    x = torch.randn(5, 4)
    torch.testing.assert_close(x * changed[norm, "weight"] @ changed[router, "weight"].T, x @ router.weight.T)


def test_a_norm_of_each_head_ties_the_channels_of_one_weight() -> None:
    fold = NormFold(nn.RMSNorm(2), "plain", width=6)
    scale = torch.tensor([1.0, 2.0, 8.0, 2.0, 1.0, 2.0])
    tied = fold.tie(scale)
    torch.testing.assert_close(tied, torch.tensor([2.0, 2.0] * 3))
    assert torch.equal(fold.channels(torch.tensor([3.0, 5.0])), torch.tensor([3.0, 5.0] * 3))
    torch.testing.assert_close(fold.tie(torch.stack([scale, scale]))[1], tied)
    assert torch.equal(combined(fold.changes(tied))[fold.module, "weight"], 1 / tied[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_of_an_offset_norm_is_exact_under_the_factors_of_a_proof(dtype: torch.dtype) -> None:
    norm = models.Norm(1000, offset=True).to(dtype)
    fold = NormFold(norm, "offset")
    trial = combined(fold.trial())[norm, "weight"]
    for exponent in (-2, -1, 1, 2):
        divided = (1 + trial.double()) / 2.0**exponent - 1
        assert torch.equal(divided.to(dtype).double(), divided)
    assert ((1 + trial.double()).log2() % 1 == 0).all()


def test_rows_that_several_channels_come_from_have_one_scale() -> None:
    linear = nn.Linear(3, 4)
    fold = LinearFold(linear, torch.tensor([2, 3, 2, 3]))  # rows 0 and 1 do not reach the group
    tied = fold.tie(torch.tensor([1.0, 3.0, 4.0, 3.0]))
    torch.testing.assert_close(tied, torch.tensor([2.0, 3.0, 2.0, 3.0]))
    divisor = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert torch.equal(fold.divisor(torch.tensor([2.0, 3.0, 2.0, 3.0])), divisor)
    changed = combined(fold.changes(torch.tensor([2.0, 3.0, 2.0, 3.0])))
    assert torch.equal(changed[linear, "weight"], linear.weight.detach() / divisor[:, None])
    assert torch.equal(changed[linear, "bias"], linear.bias.detach() / divisor)
    assert torch.equal(fold.channels(torch.arange(4.0)), torch.tensor([2.0, 3.0, 2.0, 3.0]))
