"""All instruction sets against each other, on shapes and numbers that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from checks import RANKS_IN_BF16
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference
from awq_ext.layers import ops

LEVELS = _C.available_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)
MANY = settings(FEW, max_examples=1500)
LAYERS = {
    "rows": st.integers(1, 40),
    "n": st.integers(1, 100),
    "k": st.integers(1, 300),
    "group_size": st.one_of(st.just(-1), st.sampled_from([8, 16, 32, 128]), st.integers(1, 320)),
    "bits": st.sampled_from([4, 8]),
    "symmetric": st.booleans(),  # whose scales have both signs
    "dtype": st.sampled_from(DTYPES),
    "scale_dtype": st.sampled_from(DTYPES[1:]),
    "extras": st.booleans(),
    "compute": st.sampled_from(["auto", "int8"]),
    "threads": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
}


def at_each_level(work) -> dict[str, tuple[Tensor, ...]]:
    """What ``work`` returns on every instruction set."""
    before, found = _C.isa(), {}
    try:
        for name in LEVELS:
            _C.set_isa(name)
            found[name] = work()
    finally:
        _C.set_isa(before)
    return found


def check_layer(rows, n, k, group_size, bits, symmetric, dtype, scale_dtype, extras, compute, threads, seed) -> None:
    """Codes and tiles are the same bits everywhere; products agree within their roundings, and do not depend on threads."""
    torch.manual_seed(seed)
    weight, x = torch.randn(n, k), torch.randn(rows, k).to(dtype)
    bias, pre = (torch.randn(n).to(dtype), torch.rand(k) + 0.5) if extras else (None, None)

    def work() -> tuple[Tensor, ...]:
        codes, scales, zeros = _C.quantize_weight(weight, group_size, bits, symmetric, scale_dtype)
        packed = _C.pack_int4(codes) if bits == 4 else codes
        tiles = _C.tile_codes(packed, k, group_size, bits)
        parts = (tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits))
        sizes = (k, n, group_size, bits)
        dense = ops.quant_weight(*parts, *sizes)
        torch.set_num_threads(1)
        alone = ops.quant_linear(x, *parts, bias, pre, *sizes, compute)
        torch.set_num_threads(threads)
        product = ops.quant_linear(x, *parts, bias, pre, *sizes, compute)
        torch.set_num_threads(1)
        assert torch.equal(alone, product)
        return codes, scales, zeros, tiles, dense, product

    found = at_each_level(work)
    *exact, dense, product = found["scalar"]
    scaled = x.float() * (1 if pre is None else pre)
    # 2 (K + 4) roundings of fp32 on either side; a 16-bit input that is scaled is rounded once, the result once
    unit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    bound = (scaled.abs() @ dense.abs().T) * (unit + 4 * (k + 4) * 2.0**-24)
    bound = bound + (0 if bias is None else (bias.float().abs() + bound) * 2 * torch.finfo(dtype).eps) + 1e-30
    if compute == "int8":  # a scaled input that lies between two steps of 1/127 may go to either side: one step at most
        bound = bound + scaled.abs().amax(1, keepdim=True) * dense.abs().sum(1) * 2 / 127
    for name, (*others, other_dense, other) in found.items():
        assert all(torch.equal(a, b) for a, b in zip(others, exact, strict=True)), name
        assert torch.equal(other_dense, dense), name
        assert torch.all((other.float() - product.float()).abs() <= bound), name


def check_losses(n, k, group_size, dtype, seed) -> None:
    """Losses of scale candidates: within the error of fp32 sums, or of bf16 factors where a level ranks with those."""
    torch.manual_seed(seed)
    weight, x = torch.randn(n, k).to(dtype), torch.randn(50, k)
    moment, candidates = x.T @ x, torch.rand(3, k) + 0.5
    found = at_each_level(lambda: (_C.scale_losses(weight, candidates, moment, group_size),))
    for name, (losses,) in found.items():
        assert losses.isfinite().all(), name
        tolerance = 2.0**-6 if name in RANKS_IN_BF16 else 2.0**-12
        torch.testing.assert_close(losses, found["scalar"][0], rtol=tolerance, atol=1e-6 * float(moment.trace()))


SHAPES = {key: LAYERS[key] for key in ("n", "k", "group_size", "dtype", "seed")}


@FEW
@given(**LAYERS)
def test_layers_agree(**drawn) -> None:
    check_layer(**drawn)


@FEW
@given(**SHAPES)
def test_losses_agree(**drawn) -> None:
    check_losses(**drawn)


@pytest.mark.exhaustive
@MANY
@given(**LAYERS)
def test_many_layers_agree(**drawn) -> None:
    check_layer(**drawn)


@pytest.mark.exhaustive
@MANY
@given(**SHAPES)
def test_many_losses_agree(**drawn) -> None:
    check_losses(**drawn)
