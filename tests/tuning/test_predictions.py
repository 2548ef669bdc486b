"""Predictions kept for the likeliest tokens, and the divergence from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from awq_ext.tuning import predictions
from awq_ext.tuning.predictions import Predictions, divergence


def lumped(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """The KL divergence of rows of logits from a target's, all but the target's ``count`` likeliest tokens taken as one."""
    p, q = target.double().softmax(-1), logits.double().softmax(-1)
    kept = p.topk(count).indices
    p, q = (torch.cat([x.gather(1, kept), (1 - x.gather(1, kept).sum(1, keepdim=True))], 1) for x in (p, q))
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("kept", [3, 10])
@pytest.mark.parametrize("shape", [(7,), (2, 100)])
def test_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch, kept: int, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(predictions, "LIKELIEST", kept)
    torch.manual_seed(0)
    target, logits = 2 * torch.randn(*shape, 30), (2 * torch.randn(*shape, 30)).requires_grad_()
    found = Predictions.of_logits(target, None)
    assert found.tokens.shape == (shape[0] * (shape[1] if len(shape) > 1 else 1), kept)
    expected = lumped(logits.view(-1, 30), target.view(-1, 30), kept)
    expected.backward()
    total, gradient = divergence(logits, found)
    torch.testing.assert_close(total, float(expected.detach()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


def test_a_small_vocabulary_is_kept_whole() -> None:
    torch.manual_seed(0)
    target, logits = torch.randn(5, 30), torch.randn(5, 30, requires_grad=True)
    total, gradient = divergence(logits, Predictions.of_logits(target, None))
    expected = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum")
    expected.backward()
    torch.testing.assert_close(total, float(expected.detach()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)
    assert abs(divergence(target, Predictions.of_logits(target, None))[0]) < 1e-5


def test_positions_that_a_mask_leaves_out_cost_nothing() -> None:
    torch.manual_seed(0)
    target, logits = torch.randn(2, 4, 30), torch.randn(2, 4, 30)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    total, gradient = divergence(logits, Predictions.of_logits(target, mask))
    alone = sum(divergence(logits[mask][i], Predictions.of_logits(target[mask][i], None))[0] for i in range(4))
    assert total == pytest.approx(alone, rel=1e-5)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target, logits = torch.randn(3, 30).to(dtype), torch.randn(3, 30).to(dtype)
    total, gradient = divergence(logits, Predictions.of_logits(target, None))
    expected, exact = divergence(logits.float(), Predictions.of_logits(target.float(), None))
    assert total == expected
    assert gradient.dtype == dtype
    assert torch.equal(gradient, exact.to(dtype))


def test_what_is_no_number_is_told() -> None:
    assert Predictions.of_logits(torch.zeros(3, 9), None).usable
    assert not Predictions.of_logits(torch.full((3, 9), torch.nan), None).usable
