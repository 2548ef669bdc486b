"""The quantizer and the layouts of codes on the emulated GPU: bit for bit those of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from awq_ext.kernels import cuda, reference

SHAPES = [(1, 1), (7, 13), (3, 296), (33, 70)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE_DTYPES = [torch.float16, torch.bfloat16]


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_weight(shape: tuple[int, int], symmetric: bool) -> None:
    n, k = shape
    cases = itertools.product((-1, 128, 7), (2, 4, 8), (False, True))
    for (group_size, bits, scaled), dtype, scale_dtype in zip(
        cases, itertools.cycle(DTYPES), itertools.cycle([*SCALE_DTYPES, *reversed(SCALE_DTYPES)]), strict=False
    ):
        weight = torch.randn(shape).to(dtype)
        weight[0] = -0.25  # constant groups
        weight[-1] = weight[-1].abs()
        clip = torch.rand(n, reference.group_count(k, group_size)) * 0.5 + 0.5
        extras = {"channel_scale": torch.rand(k) + 0.5, "clip": clip} if scaled else {}
        args = (weight, group_size, bits, symmetric, scale_dtype)
        ours = cuda.quantize_weight(*args, **extras)
        assert_same(ours, reference.quantize_weight(*args, **extras))
        assert_same((cuda.dequantize_weight(*ours, group_size),), (reference.dequantize_weight(*ours, group_size),))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e-4, 1e4, 1e30])
def test_any_magnitude(magnitude: float) -> None:
    for bits, scale_dtype, dtype in itertools.product((2, 8), SCALE_DTYPES, DTYPES):
        weight = (torch.randn(5, 70) * magnitude).to(dtype).nan_to_num()
        weight[torch.rand(5, 70) < 0.2] = 0
        args = (weight, 9, bits, False, scale_dtype)
        assert_same(cuda.quantize_weight(*args), reference.quantize_weight(*args))


def test_scales_round_half_to_even_down_to_subnormals() -> None:
    halves = torch.arange(1, 0x7C00, 101, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[:-1] + halves[1:]) / 2
    weight = torch.cat([halves, middles, torch.tensor([65519.0, 65520.0, 1e30, 2.0**-30])])[:, None]
    for scale_dtype in SCALE_DTYPES:
        args = (weight, -1, 4, False, scale_dtype)
        assert_same(cuda.quantize_weight(*args), reference.quantize_weight(*args))


def test_nan_and_infinity_give_codes() -> None:
    weight = torch.randn(4, 64)
    weight[0, 3], weight[1, 5], weight[2] = float("nan"), float("inf"), float("nan")
    codes, _, zeros = cuda.quantize_weight(weight, 16)
    assert codes.max() <= 15
    assert zeros.max() <= 15


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5)])
def test_pack_int4(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = cuda.pack_int4(codes)
    assert_same((packed,), (reference.pack_int4(codes),))
    assert_same((cuda.unpack_int4(packed, shape[1]),), (codes,))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 1, -1), (5, 13, 7), (33, 70, 32), (70, 300, 64), (40, 27, -1)])
def test_tiles_there_and_back(n: int, k: int, group_size: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    rows = reference.pack_int4(codes) if bits == 4 else codes
    tiles = cuda.tile_codes(rows, k, group_size, bits)
    assert_same((tiles,), (reference.tile_codes(rows, k, group_size, bits),))
    assert_same((cuda.untile_codes(tiles, n, k, group_size, bits),), (rows,))


def test_weights_of_any_strides() -> None:
    weight = torch.randn(32, 24).T[::2, ::3]
    assert_same(cuda.quantize_weight(weight, 8), reference.quantize_weight(weight, 8))


def test_wrong_arguments() -> None:
    weight = torch.randn(4, 8)
    for wrong, error, message in (
        ({"bits": 9}, ValueError, "'bits': expected 2 to 8, got 9"),
        ({"group_size": 0}, ValueError, "'group_size': expected -1 or a positive number"),
        ({"scale_dtype": torch.float32}, TypeError, "'scale_dtype': expected float16 or bfloat16"),
        ({"channel_scale": torch.ones(7)}, ValueError, r"'channel_scale': expected shape \[8\], got \[7\]"),
        ({"clip": torch.ones(4, 1)}, ValueError, r"'clip': expected shape \[4, 2\]"),
        ({"weight": weight.double()}, TypeError, "'weight': expected float32"),
    ):
        with pytest.raises(error, match=message):
            cuda.quantize_weight(**({"weight": weight, "group_size": 4} | wrong))
    with pytest.raises(ValueError, match=r"'tiles': expected shape \[1, 2, 64\]"):
        cuda.untile_codes(torch.zeros(1, 3, 64, dtype=torch.uint8), 4, 8, -1, 4)
