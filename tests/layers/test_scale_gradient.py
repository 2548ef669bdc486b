"""quant_scale_gradient: values on every instruction set, registration, and the gradient of quant_linear's scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference
from awq_ext.layers import ops

# rows, outputs, channels, group size: odd sizes, a short last group, one group a row, more rows than are packed at a time
CASES = [(1, 1, 1, -1), (3, 5, 13, 7), (40, 33, 70, 32), (530, 40, 90, 16), (9, 65, 1100, -1)]


def layer(n: int, k: int, group_size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n * 1000 + k)
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k), group_size, bits, scale_dtype=torch.float16)
    rows = _C.pack_int4(codes) if bits == 4 else codes
    tiles = _C.tile_codes(rows, k, group_size, bits)
    return tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)


def bound(gradient: Tensor, x: Tensor, parts: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...]) -> Tensor:
    """Bound of |ours - reference|: on both sides a product passes at most rows + channels sums in fp32."""
    k, n, group_size, bits = sizes
    integers = reference.quant_weight(parts[0], torch.ones_like(parts[1]), parts[2], k, n, group_size, bits).abs()
    weights = (gradient.float().abs().T @ x.float().abs()) * integers
    length = reference.group_length(k, group_size)
    sums = torch.nn.functional.pad(weights, (0, -k % length)).view(n, -1, length).sum(-1)
    return sums * 2 * (len(x) + length + 8) * 2.0**-24 + 1e-30


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k", "group_size"), CASES)
def test_values(isa: str, dtype: torch.dtype, rows: int, n: int, k: int, group_size: int, bits: int) -> None:
    parts, sizes = layer(n, k, group_size, bits), (k, n, group_size, bits)
    gradient, x = torch.randn(rows, n).to(dtype), torch.randn(rows, k).to(dtype)
    for pre in (None, torch.rand(k) + 0.5):
        ours, expected = (f.quant_scale_gradient(gradient, x, *parts, pre, *sizes) for f in (ops, reference))
        assert ours.dtype == torch.float32
        assert ours.shape == (n, reference.group_count(k, group_size))
        assert ((ours - expected).abs() <= bound(gradient, x if pre is None else x * 1.5, parts, sizes)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    parts, before = layer(200, 300, 64, 4), torch.get_num_threads()
    gradient, x = torch.randn(600, 200).to(dtype), torch.randn(600, 300).to(dtype)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.quant_scale_gradient(gradient, x, *parts, None, 300, 200, 64, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    parts, gradient, x = layer(6, 20, 8, bits), torch.randn(2, 3, 6), torch.randn(2, 3, 20)
    for pre in (None, torch.rand(20) + 0.5):
        torch.library.opcheck(
            torch.ops.awq_ext.quant_scale_gradient.default, (gradient, x, *parts, pre, 20, 6, 8, bits)
        )


# torch 2.14 means to hide its own warning: see test_ops.py
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_of_a_linear_whose_scales_are_trained(bits: int) -> None:
    tiles, scales, zeros = layer(6, 20, 8, bits)
    x = torch.randn(2, 3, 20, requires_grad=True)
    given = (x, tiles, scales.requires_grad_(), zeros, None, None, 20, 6, 8, bits)
    torch.library.opcheck(torch.ops.awq_ext.quant_linear.default, given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("x_trained", [False, True])
def test_gradient_of_scales_agrees_with_differences(bits: int, scaled: bool, x_trained: bool) -> None:
    """quant_linear is linear in each scale, so a difference of any size is its derivative."""
    tiles, scales, zeros = layer(40, 20, 8, bits)
    x, pre = torch.randn(2, 5, 20, requires_grad=x_trained), torch.rand(20) + 0.5 if scaled else None
    direction = torch.randn(2, 5, 40)

    def loss(given: Tensor) -> Tensor:
        return (ops.quant_linear(x, tiles, given, zeros, None, pre, 20, 40, 8, bits) * direction).sum()

    trained = scales.clone().requires_grad_()
    loss(trained).backward()
    assert trained.grad.shape == scales.shape
    assert trained.grad.dtype == torch.float16
    assert (x.grad is not None) == x_trained
    with torch.no_grad():
        for place in ((0, 0, 0), (0, 2, 31), (1, 1, 7)):
            moved = scales.clone()
            moved[place] += 1.0
            expected = loss(moved) - loss(scales)
            torch.testing.assert_close(trained.grad[place].float(), expected, rtol=2e-3, atol=2e-3)
    # outputs that only fill up the last tile
    assert (trained.grad[1, :, 8:] == 0).all()


def test_differentiating_twice_is_an_error() -> None:
    tiles, scales, zeros = layer(6, 20, 8, 4)
    x = torch.randn(3, 20, requires_grad=True)
    y = ops.quant_linear(x, tiles, scales.requires_grad_(), zeros, None, None, 20, 6, 8, 4)
    (gradient,) = torch.autograd.grad(y.sum(), scales, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.float().square().sum().backward()


@pytest.mark.parametrize("name", ["shape", "dtype", "x"])
def test_errors(name: str) -> None:
    parts, gradient, x = layer(6, 20, 8, 4), torch.randn(3, 6), torch.randn(3, 20)
    kind, match = {"shape": (ValueError, "gradient"), "dtype": (TypeError, "gradient"), "x": (ValueError, "x")}[name]
    gradient = {"shape": gradient[:2], "dtype": gradient.bfloat16()}.get(name, gradient)
    x = x[:, :19] if name == "x" else x
    with pytest.raises(kind, match=match):
        ops.quant_scale_gradient(gradient, x, *parts, None, 20, 6, 8, 4)
