"""Products of numbers held as several bf16, at every instruction set: those with tile registers use them, the others do not."""

from __future__ import annotations

import pytest
import torch
from checks import moment
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

EPS = 2.0**-24  # relative error of one fp32 operation
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# every test here, on every instruction set
pytestmark = pytest.mark.usefixtures("isa")


def second_moment(x: Tensor, weights: Tensor | None = None) -> Tensor:
    stats = _C.ActivationStats(x.shape[1])
    stats.update(x, weights=weights)
    return stats.second_moment()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(31, 33), (33, 65), (129, 31), (385, 32), (1057, 40), (40, 417)])
def test_moments_of_integers_are_exact(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every product and every sum of these fits 24 bits, so not one may be missing, whatever the edges of tiles and blocks."""
    most = 2**6 if dtype == torch.bfloat16 else 2**10  # fits one term, or needs two
    x = torch.randint(-most, most, shape).to(dtype)
    if dtype != torch.bfloat16:
        x *= torch.rand(shape[0], 1) < 15 / shape[0]  # at most 2^4 rows of 2^20
        x[torch.nonzero(x.any(1)).flatten()[16:]] = 0
    assert torch.equal(second_moment(x).double(), x.double().T @ x.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_and_four_are_exact(dtype: torch.dtype) -> None:
    x, weights = torch.randint(-64, 64, (100, 50)).to(dtype), torch.tensor([1.0, 4.0]).repeat(50)
    share = 100 / float(weights.sum())
    expected = (x.double().T * weights.double()) @ x.double()  # below 2^24
    assert torch.equal(second_moment(x, weights), expected.float() * torch.tensor(share))


def test_products_of_floats_lose_no_more_than_rounding() -> None:
    """One row: each product passes at most the terms left out, 2^-24 (1 + 2^-8), and the roundings of its few sums."""
    x = torch.randn(1, 700) * 2.0 ** torch.randint(-20, 20, (1, 700))
    exact = x.double().T @ x.double()
    # Terms 1 1 with 1 3, and once more with the result; sums of small terms are off by at most 2^-7 of that.
    assert torch.all((second_moment(x).double() - exact).abs() <= 3.1 * EPS * exact.abs())


def test_the_largest_floats_have_terms_too() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 1e-10, 0.5]])
    exact = x.double().T @ x.double()
    ours = second_moment(x).double()
    assert not ours[:2, :2].isfinite().any()
    # cut off instead of rounded, the second term is at most 2^-7: 2^-23 of a product left out
    assert torch.all(((ours - exact).abs() <= 5 * EPS * exact.abs())[:, 2:])


@pytest.mark.parametrize("k", [511, 512, 513, 575, 609])
def test_losses_of_many_channels(k: int) -> None:
    """The same bound for sums of 256 in fp32, and for two terms on tile registers: csrc/drivers/quadratic.h."""
    error, g = torch.randn(37, k), moment(k)
    exact = reference.quadratic_loss(error.double(), g.double())
    size = (error.abs().double() @ g.abs().double() * error.abs().double()).sum(1)
    assert torch.all((_C.quadratic_loss(error, g) - exact).abs() <= 306 * EPS * size)


@pytest.mark.parametrize("k", [512, 530])
def test_no_product_of_terms_is_missing_from_losses(k: int) -> None:
    """Numbers of 16 bits have two terms and nothing beyond. One channel a row: three sums, two products, no cancelling."""
    channels = torch.randint(0, k, (70,))
    error = torch.zeros(70, k).scatter_(1, channels[:, None], torch.randint(2**15, 2**16, (70, 1)).float())
    g = torch.randint(2**15, 2**16, (k, k)).float()
    g = torch.minimum(g, g.T)
    exact = reference.quadratic_loss(error.double(), g.double())
    assert torch.all((_C.quadratic_loss(error, g) - exact).abs() <= 8 * EPS * exact)


def test_rows_of_losses_are_independent() -> None:
    error, g = torch.randn(70, 540), moment(540)
    losses = _C.quadratic_loss(error, g)
    for first, last in ((0, 1), (5, 37), (69, 70)):
        assert torch.equal(_C.quadratic_loss(error[first:last], g), losses[first:last])
    error[40, 7], error[41, 8] = float("nan"), float("inf")
    assert torch.equal(_C.quadratic_loss(error, g).isfinite(), (torch.arange(70) != 40) & (torch.arange(70) != 41))
    assert torch.equal(_C.quadratic_loss(error, g)[:40], losses[:40])
