"""code_losses: the errors of quantized weights, at every instruction set that this processor has."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from checks import RANKS_IN_BF16, moment
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 13), (3, 300), (20, 1), (33, 64), (130, 700)]
EPS = 2.0**-24  # relative error of one fp32 operation
KERNELS = pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])

# every test here, on every instruction set
pytestmark = pytest.mark.usefixtures("isa")


def error_of(
    weight: Tensor, parts: tuple[Tensor, ...], group_size: int, scale: Tensor | None, divisor: Tensor | None
) -> Tensor:
    """The error in the space of the weight, step by step in fp32."""
    error = reference.dequantize_weight(*parts, group_size)
    if scale is not None:
        error = error / scale
    if divisor is not None:
        error = error * divisor[:, None]
    return error - weight.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 128, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_code_losses(shape: tuple[int, int], dtype: torch.dtype, group_size: int, bits: int) -> None:
    n, k = shape
    weight, g = torch.randn(shape).to(dtype), moment(k)
    for scale, divisor, scale_dtype in itertools.product(
        (None, torch.rand(k) + 0.5), (None, torch.rand(n) + 0.5), (torch.float16, torch.bfloat16)
    ):
        rows = weight if divisor is None else weight / divisor[:, None]
        parts = reference.quantize_weight(rows, group_size, bits, scale_dtype=scale_dtype, channel_scale=scale)
        error = error_of(weight, parts, group_size, scale, divisor)
        expected = _C.quadratic_loss(error, g).clamp_min(0)
        others = (g, group_size, scale, divisor)
        plain, damped = _C.code_losses(weight, *parts, *others, 0.3)
        assert torch.equal(plain, expected)
        # fp64: two products and at most K sums a term, all of one sign; the share and the last sum
        own = 0.3 * (error.double().square() @ g.diagonal().double())
        assert torch.all((damped - plain - own).abs() <= 2.0**-53 * ((k + 4) * own + damped))
        again, same = _C.code_losses(weight, *parts, *others)
        assert torch.equal(again, plain)
        assert torch.equal(same, plain)
        if bits == 4:
            packed = _C.pack_int4(parts[0])
            for mine, other in zip(
                _C.code_losses(weight, packed, *parts[1:], *others, 0.3), (plain, damped), strict=True
            ):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranking_losses(shape: tuple[int, int]) -> None:
    k = shape[1]
    weight, g, scale = torch.randn(shape), moment(k), torch.rand(k) + 0.5
    parts = reference.quantize_weight(weight, 32, channel_scale=scale)
    others = (g, 32, scale, None, 1.0)
    plain, damped = _C.code_losses(weight, *parts, *others)
    fast, raised = _C.code_losses(weight, *parts, *others, ranking=True)
    error = error_of(weight, parts, 32, scale, None).abs().double()
    # e, twice a factor, and G are rounded, each entry by at most 2^-8; the products and sums are bounded as those of exact losses
    bound = ((error @ g.abs().double()) * error).sum(1) * (3.02 * 2.0**-8 + 2 * EPS * (k + 40))
    assert ((fast - plain).abs() <= bound).all()
    own = damped - plain
    assert torch.all((raised - fast - own).abs() <= 2.0**-50 * (own + damped + raised))
    if _C.isa() not in RANKS_IN_BF16:
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_both_implementations_agree(shape: tuple[int, int], packed: bool) -> None:
    n, k = shape
    weight, g, scale, divisor = torch.randn(shape), moment(k), torch.rand(k) + 0.5, torch.rand(n) + 0.5
    parts = list(reference.quantize_weight(weight / divisor[:, None], 32, channel_scale=scale))
    error = error_of(weight, parts, 32, scale, divisor).abs().double()
    if packed:
        parts[0] = _C.pack_int4(parts[0])
    ours, expected = (m.code_losses(weight, *parts, g, 32, scale, divisor, 0.5) for m in (_C, reference))
    # the errors are equal bit for bit; a term passes 2 products and at most K sums in fp32 in either, the rest is fp64
    bound = ((error @ g.abs().double()) * error).sum(1) * (2 * EPS * (k + 40))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.all((a - b).abs() <= bound)


@KERNELS
def test_no_loss_is_negative(kernels: ModuleType) -> None:
    weight = torch.randint(-8, 8, (5, 64)).float()
    parts = reference.quantize_weight(weight, 32)
    exact = reference.dequantize_weight(*parts, 32)
    plain, damped = kernels.code_losses(exact, *parts, moment(64), 32, damping=1.0)
    assert not plain.any()
    assert not damped.any()
    # what rounding may leave of inputs that hardly vary
    plain, damped = kernels.code_losses(torch.randn(5, 64), *parts, -torch.eye(64), 32, damping=0.0)
    assert not plain.any()
    assert not damped.any()


@KERNELS
def test_rows_of_nothing_and_numbers_that_are_none(kernels: ModuleType) -> None:
    weight, g = torch.randn(4, 20), moment(20)
    parts = reference.quantize_weight(weight, 8)
    for losses in kernels.code_losses(weight[:0], *(part[:0] for part in parts), g, 8, damping=1.0):
        assert losses.shape == (0,)
        assert losses.dtype == torch.float64
    weight[2, 3] = float("nan")
    for losses in kernels.code_losses(weight, *parts, g, 8, damping=1.0):
        assert losses.isnan().tolist() == [False, False, True, False]


def test_rows_are_independent_of_threads_and_of_each_other() -> None:
    weight, g, scale = torch.randn(300, 200).bfloat16(), moment(200), torch.rand(200) + 0.5
    parts = _C.quantize_weight(weight, 64, channel_scale=scale)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_C.code_losses(weight, *parts, g, 64, scale, damping=1.0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    rows = torch.arange(7, 300, 11)
    some = _C.code_losses(weight[rows], *(part[rows] for part in parts), g, 64, scale, damping=1.0)
    assert all(torch.equal(a, b[rows]) for a, b in zip(some, found[0], strict=True))
    strided = _C.code_losses(weight[::2], *(part[::2] for part in parts), g, 64, scale, damping=1.0)
    assert all(torch.equal(a, b[::2]) for a, b in zip(strided, found[0], strict=True))


W, C, S, Z, G = torch.zeros(4, 8), torch.zeros(4, 8).byte(), torch.ones(4, 2), torch.zeros(4, 2).byte(), torch.eye(8)
ERRORS = {
    "weight": (lambda: _C.code_losses(W.int(), C, S, Z, G, 4), TypeError, "'weight'"),
    "codes": (lambda: _C.code_losses(W, C[:, :5], S, Z, G, 4), ValueError, r"'codes'.*\[4, 4\].*\[4, 5\]"),
    "codes dtype": (lambda: _C.code_losses(W, C.int(), S, Z, G, 4), TypeError, "'codes'"),
    "scales": (lambda: _C.code_losses(W, C, S[:, :1], Z, G, 4), ValueError, "'scales'"),
    "zeros": (lambda: _C.code_losses(W, C, S, Z.float(), G, 4), TypeError, "'zeros'"),
    "moment": (lambda: _C.code_losses(W, C, S, Z, G[:4], 4), ValueError, "'second_moment'"),
    "group size": (lambda: _C.code_losses(W, C, S, Z, G, 0), ValueError, "'group_size'"),
    "channel_scale": (lambda: _C.code_losses(W, C, S, Z, G, 4, torch.ones(4)), ValueError, "'channel_scale'"),
    "divisor": (lambda: _C.code_losses(W, C, S, Z, G, 4, None, torch.ones(8)), ValueError, "'divisor'"),
    "damping": (lambda: _C.code_losses(W, C, S, Z, G, 4, damping=-1.0), ValueError, "'damping'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
