"""Products on tile registers: Intel's AMX where the processor has it, and its emulation everywhere on x86-64.

The other tests of quant_linear run on these levels too; here is what only tiles do.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference
from awq_ext.layers import ops

LEVELS = [name for name in _C.available_isas() if name.startswith("amx")]
pytestmark = pytest.mark.skipif(not LEVELS, reason="tile registers are a matter of x86-64")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def unit_layer(codes: Tensor, zeros: Tensor, group_size: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Weights code - zero: scales of 1."""
    rows = _C.pack_int4(codes) if bits == 4 else codes
    tiles = _C.tile_codes(rows, codes.shape[1], group_size, bits)
    return tiles, reference.tile_scales(torch.ones(zeros.shape).half()), reference.tile_zeros(zeros, bits)


def product(x: Tensor, parts: tuple[Tensor, Tensor, Tensor], n: int, group_size: int, compute: str = "auto") -> Tensor:
    bits = parts[0].shape[2] // 16
    return ops.quant_linear(x, *parts, None, None, x.shape[-1], n, group_size, bits, compute)


@pytest.mark.parametrize("rows", [3, 10, 11, 32, 33, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_hold_every_bit(level: str, dtype: torch.dtype, rows: int) -> None:
    """A unit matrix gives the activations back: a float is three bf16, a half is two, whatever its size."""
    k = 72
    parts = unit_layer(torch.eye(k, dtype=torch.uint8), torch.zeros(k, 2, dtype=torch.uint8), 40)
    x = (torch.randn(rows, k) * 10 ** (4 * torch.rand(rows, k) - 2)).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)
    assert torch.equal(product(x, parts, k, 40), x)


@pytest.mark.parametrize("rows", [1, 2])
def test_bf16_in_three_terms_of_eight_bits(level: str, rows: int) -> None:
    """Off by at most 2^-24 of a run's largest activation, then rounded to bf16: choice.cpp."""
    k, run = 600, 256
    parts = unit_layer(torch.eye(k, dtype=torch.uint8), torch.zeros(k, 1, dtype=torch.uint8), -1)
    x = (torch.randn(rows, k) * 10 ** (6 * torch.rand(rows, k) - 3)).bfloat16()
    largest = torch.cat(
        [x[:, i : i + run].abs().amax(1, keepdim=True).expand(-1, min(run, k - i)) for i in range(0, k, run)], 1
    )
    error = (product(x, parts, k, -1).float() - x.float()).abs()
    assert torch.all(error <= 2.0**-24 * largest.float() + x.float().abs() * 2.0**-8)
    # and not by as much as two terms would be
    small = x.float().abs() < largest.float() * 2.0**-12
    assert small.any()
    assert torch.all(error[small] <= largest.float()[small] * 2.0**-20)


@pytest.mark.parametrize(("dtype", "compute", "rows"), [(torch.bfloat16, "int8", 1030), (torch.float32, "auto", 350)])
def test_many_rows_are_multiplied_band_by_band(level: str, dtype: torch.dtype, compute: str, rows: int) -> None:
    """More than 512 rows of elements, of which a float has three: each row as in a product of few rows, bit for bit."""
    k, n, group_size = 48, 70, 16
    codes, zeros = torch.randint(0, 16, (n, k)).byte(), torch.randint(0, 16, (n, k // group_size)).byte()
    parts = unit_layer(codes, zeros, group_size)
    x = torch.randn(rows, k).to(dtype)
    parts_of_x = [product(some, parts, n, group_size, compute) for some in x.split(100)]
    assert torch.equal(product(x, parts, n, group_size, compute), torch.cat(parts_of_x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("compute", ["auto", "int8"])
@pytest.mark.parametrize(("k", "group_size"), [(4, 4), (36, 12), (68, 68), (260, 20), (600, 300), (2200, -1)])
def test_integers_are_exact(level: str, k: int, group_size: int, compute: str, bits: int) -> None:
    """Groups shorter than a tile, of several tiles and a rest, and longer than a run; sums below 2^24."""
    n, groups = 45, reference.group_count(k, group_size)
    codes, zeros = torch.randint(0, 2**bits, (n, k)), torch.randint(0, 2**bits, (n, groups))
    weight = codes - reference.expand_groups(zeros, k, group_size)
    parts = unit_layer(codes.byte(), zeros.byte(), group_size, bits)
    for rows in (9, 16, 17, 40):
        # random signs keep the sums of 8 bits below 2^24 too: of 2200 products up to 2^15, rms 2^14, six sigma are 2^22
        x = torch.randint(-127, 128, (rows, k))
        length = reference.group_length(k, group_size)
        for start in range(0, length, 256):  # the largest of each run, so that its scale is 1
            x[:, start::length] = 127
        assert torch.equal(product(x.float(), parts, n, group_size, compute), (x @ weight.T).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(level: str, dtype: torch.dtype, value: float) -> None:
    k = 70
    codes = torch.randint(0, 15, (9, k)).byte()
    parts = unit_layer(codes, torch.full((9, 3), 15, dtype=torch.uint8), 32)  # no weight is 0
    for rows in (1, 2, 5, 40):
        x = torch.randn(rows, k).to(dtype)
        x[rows // 2, 66] = value
        wrong = ~product(x, parts, 9, 32).isfinite()
        expected = torch.zeros(rows, 9, dtype=torch.bool)
        expected[rows // 2] = True
        assert torch.equal(wrong, expected)


def test_emulated_tiles_are_not_damaged_by_other_threads(level: str) -> None:
    holds, preempted, damaged = _C.probe_tiles(30)
    assert holds >= 1
    assert 0 <= preempted <= holds
    if level != "amx":
        assert damaged == 0


def test_levels_without_tiles_have_nothing_to_probe() -> None:
    before = _C.isa()
    try:
        _C.set_isa("scalar")
        assert _C.probe_tiles(5) == (0, 0, 0)
    finally:
        _C.set_isa(before)


@pytest.mark.skipif("amx_emulated" not in LEVELS, reason="needs AVX-512 with products of bytes")
def test_the_check_that_decides_about_amx_finds_both_emulations_equal() -> None:
    assert _C.emulated_tiles_agree()
