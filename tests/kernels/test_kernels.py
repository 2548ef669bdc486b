"""Every function of awq_ext._C against its reference, at every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from checks import RANKS_IN_BF16
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE_DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7, 13), (3, 576), (1, 64), (20, 1), (33, 300)]
EPS = 2.0**-24  # relative error of one fp32 operation
MANY = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# every test here, on every instruction set
pytestmark = pytest.mark.usefixtures("isa")


def moment(k: int, rows: int = 40) -> Tensor:
    x = torch.randn(rows, k) * torch.rand(k).add(0.1)
    return x.T @ x


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


# --- quantizer: integers and 16-bit patterns are exact ---------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_weight(shape: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype, symmetric: bool) -> None:
    n, k = shape
    weight = torch.randn(shape).to(dtype)
    weight[0] = -0.25  # constant groups
    weight[-1] = weight[-1].abs()
    for group_size in (-1, 128, 7):
        for bits in (2, 4, 8):
            for scaled in (False, True):
                kwargs = {
                    "bits": bits,
                    "symmetric": symmetric,
                    "scale_dtype": scale_dtype,
                    "channel_scale": torch.rand(k) + 0.5 if scaled else None,
                    "clip": torch.rand(n, reference.group_count(k, group_size)) * 0.5 + 0.5 if scaled else None,
                }
                ours = _C.quantize_weight(weight, group_size, **kwargs)
                assert_same(ours, reference.quantize_weight(weight, group_size, **kwargs))
                assert_same(
                    (_C.dequantize_weight(*ours, group_size),), (reference.dequantize_weight(*ours, group_size),)
                )


@MANY
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    group_size=st.one_of(st.just(-1), st.integers(1, 80)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-30, 1e-7, 1e-4, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_quantize_weight_any(n, k, group_size, bits, symmetric, scale_dtype, dtype, magnitude, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * magnitude).to(dtype).nan_to_num()
    weight[torch.rand(n, k, generator=generator) < 0.2] = 0
    args = (weight, group_size, bits, symmetric, scale_dtype)
    assert_same(_C.quantize_weight(*args), reference.quantize_weight(*args))


def test_scales_round_half_to_even_down_to_subnormals() -> None:
    # |w| is the scale of a one-weight group: a third of all fp16 values, the midpoints between them, their neighbours.
    halves = torch.arange(1, 0x7C00, 3, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[:-1] + halves[1:]) / 2
    near = torch.cat([middles.nextafter(torch.zeros(1)), middles.nextafter(torch.full((1,), 1e9))])
    weight = torch.cat([halves, middles, near, torch.tensor([65519.0, 65520.0, 1e30, 2.0**-30])])[:, None]
    for scale_dtype in SCALE_DTYPES:
        args = (weight, -1, 4, False, scale_dtype)
        assert_same(_C.quantize_weight(*args), reference.quantize_weight(*args))


def test_half_weights_are_read_exactly() -> None:
    bits = torch.arange(0, 0x7C00, 1, dtype=torch.int32)
    weight = torch.cat([bits, bits | 0x8000]).to(torch.int16).view(torch.float16).reshape(62, -1)
    assert_same(_C.quantize_weight(weight, 128, 8), reference.quantize_weight(weight, 128, 8))


def test_quantize_non_contiguous() -> None:
    weight = torch.randn(64, 48).T[::2, ::3]
    assert_same(_C.quantize_weight(weight, 8), reference.quantize_weight(weight, 8))


def test_nan_and_infinity_do_not_crash() -> None:
    weight = torch.randn(4, 64)
    weight[0, 3], weight[1, 5], weight[2] = float("nan"), float("inf"), float("nan")
    codes, _, zeros = _C.quantize_weight(weight, 16)
    assert codes.max() <= 15
    assert zeros.max() <= 15


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)])
def test_pack_int4(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = _C.pack_int4(codes)
    assert_same((packed,), (reference.pack_int4(codes),))
    assert_same((_C.unpack_int4(packed, shape[1]),), (codes,))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 258), (40, 600)])
@pytest.mark.parametrize("group_size", [-1, 128, 16, 7])
def test_tile_codes(shape: tuple[int, int], group_size: int, bits: int) -> None:
    n, k = shape
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    rows = _C.pack_int4(codes) if bits == 4 else codes
    tiles = _C.tile_codes(rows, k, group_size, bits)
    assert_same((tiles,), (reference.tile_codes(rows, k, group_size, bits),))
    for module in (_C, reference):
        assert_same((module.untile_codes(tiles, n, k, group_size, bits),), (rows,))


def test_a_byte_of_a_tile() -> None:
    """Where csrc/base/layout.h says that a code is: byte 4j + 2r + q of a step, outputs j and 16 + j, channel 2q + r."""
    codes = torch.randint(0, 16, (64, 20), dtype=torch.uint8)
    tiles = _C.tile_codes(_C.pack_int4(codes), 20, 10, 4)  # steps: channels 0-3, 4-7, 8-9, 10-13, ...
    assert tiles.shape == (2, 6, 64)
    assert tiles[1, 4, 4 * 5 + 2 * 1 + 1] == codes[32 + 5, 17] | codes[32 + 21, 17] << 4
    assert tiles[0, 2, 2] == codes[0, 9] | codes[16, 9] << 4
    assert tiles[0, 2, 1] == 0


def test_a_byte_of_a_tile_of_eight_bits() -> None:
    """Likewise: byte 4j + 2r + q of a step is output j, channel 2q + r."""
    codes = torch.randint(0, 256, (64, 20), dtype=torch.uint8)
    tiles = _C.tile_codes(codes, 20, 10, 8)
    assert tiles.shape == (2, 6, 128)
    assert tiles[1, 4, 4 * 21 + 2 * 1 + 1] == codes[32 + 21, 17]
    assert tiles[0, 2, 4 * 16 + 2] == codes[16, 9]
    assert tiles[0, 2, 1] == 0


@pytest.mark.parametrize("name", ["tile_codes", "untile_codes"])
def test_tiles_of_other_widths(name: str) -> None:
    args = (torch.zeros(4, 8, dtype=torch.uint8), *((4,) if name == "untile_codes" else ()), 8, 8)
    with pytest.raises(ValueError, match=f"{name}: argument 'bits': expected 4 or 8, got 5"):
        getattr(_C, name)(*args, 5)


# --- losses: fp32 products, so bounds from the number of roundings ---------------------------------------------


def quadratic_bound(error: Tensor, g: Tensor) -> Tensor:
    """Each term e_i G_ij e_j passes at most 2 products and as many fp32 sums as a block holds (256) plus a tile's width
    (32); the longer sums are in fp64. What we compare with is exact."""
    return (error.abs().double() @ g.abs().double() * error.abs().double()).sum(1) * (EPS * 400)


@pytest.mark.parametrize("shape", [*SHAPES, (130, 700), (2, 1100)])
def test_quadratic_loss(shape: tuple[int, int]) -> None:
    error, g = torch.randn(shape), moment(shape[1])
    exact = reference.quadratic_loss(error.double(), g.double())
    ours = _C.quadratic_loss(error, g)
    assert ours.dtype == torch.float64
    assert torch.all((ours - exact).abs() <= quadratic_bound(error, g))


def test_quadratic_loss_of_nothing() -> None:
    assert _C.quadratic_loss(torch.empty(0, 5), torch.eye(5)).shape == (0,)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 128, 7])
def test_scale_losses(shape: tuple[int, int], dtype: torch.dtype, group_size: int) -> None:
    weight, g, candidates = torch.randn(shape).to(dtype), moment(shape[1]), torch.rand(5, shape[1]) + 0.5
    for kwargs in ({}, {"symmetric": True, "bits": 3, "scale_dtype": torch.bfloat16}):
        ours = _C.scale_losses(weight, candidates, g, group_size, **kwargs)
        for c, s in enumerate(candidates):
            parts = reference.quantize_weight(weight, group_size, channel_scale=s, **kwargs)
            error = reference.dequantize_weight(*parts, group_size) / s - weight.float()
            exact = reference.quadratic_loss(error.double(), g.double()).sum()
            assert (ours[c] - exact).abs() <= quadratic_bound(error, g).sum()


def test_scale_losses_of_some_rows(isa: str) -> None:
    weight, g, candidates = torch.randn(60, 300), moment(300), torch.rand(4, 300) + 0.5
    ours = _C.scale_losses(weight, candidates, g, 128, max_rows=7)
    expected = reference.scale_losses(weight, candidates, g, 128, max_rows=7)
    # bf16 factors where the level has them: each is off by at most 2^-8 relatively, with random signs; 2^-7 of the loss
    # is far outside what they add up to, and far inside the effect of a wrong row.
    tolerance = 2.0**-7 if isa in RANKS_IN_BF16 else 1e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    all_rows = _C.scale_losses(weight, candidates, g, 128)
    assert torch.equal(_C.scale_losses(weight, candidates, g, 128, max_rows=60), all_rows)
    assert torch.equal(_C.scale_losses(weight, candidates, g, 128, max_rows=1000), all_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 128, 7])
@pytest.mark.parametrize("scaled", [False, True])
def test_search_clip(isa: str, shape: tuple[int, int], dtype: torch.dtype, group_size: int, scaled: bool) -> None:
    n, k = shape
    weight, g = torch.randn(shape).to(dtype), moment(k)
    ratios, s = torch.linspace(1, 0.5, 6), torch.rand(k) + 0.5 if scaled else None
    chosen = _C.search_clip(weight, g, ratios, group_size, channel_scale=s)
    assert chosen.shape == (n, reference.group_count(k, group_size))
    # Ratios whose losses agree within rounding may swap places: compare what the choice costs, in fp64.
    pad = (0, -k % reference.group_length(k, group_size))
    groups, blocks = chosen.shape[1], torch.nn.functional.pad(g, pad * 2).double()
    blocks = blocks.view(groups, -1, groups, blocks.shape[0] // groups).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def losses(clip: Tensor) -> tuple[Tensor, Tensor]:
        parts = reference.quantize_weight(weight, group_size, channel_scale=s, clip=clip)
        error = reference.dequantize_weight(*parts, group_size) / (1 if s is None else s) - weight.float()
        error = torch.nn.functional.pad(error, pad).double().view(n, groups, -1)
        exact = (torch.einsum("ngi,gij->ngj", error, blocks) * error).sum(-1)
        magnitude = (torch.einsum("ngi,gij->ngj", error.abs(), blocks.abs()) * error.abs()).sum(-1)
        # as quadratic_bound; in bf16 each of a term's three factors is off by at most 2^-8
        return exact, magnitude * (EPS * 400 + (3.02 * 2.0**-8 if isa in RANKS_IN_BF16 else 0))

    cost, bound = losses(chosen)
    for ratio in ratios:
        other, other_bound = losses(torch.full_like(chosen, ratio))
        assert torch.all(cost <= other + bound + other_bound)


def test_search_clip_prefers_the_first_of_equals() -> None:
    weight = torch.full((3, 32), 0.5)  # constant groups are exact under every ratio
    chosen = _C.search_clip(weight, torch.eye(32), torch.tensor([0.9, 1.0, 0.8]), 16)
    assert torch.equal(chosen, torch.full((3, 2), 0.9))


# --- statistics ------------------------------------------------------------------------------------------------


def assert_stats(stats: object, x: Tensor) -> None:
    """x: the rows that were counted, fp64."""
    n = x.shape[0]
    assert stats.rows == n
    # fp64 sums of exact values
    torch.testing.assert_close(stats.abs_sum(), x.abs().sum(0), rtol=1e-12, atol=0)
    # signed terms cancel: the error of either sum is at most n units of 2^-53 of the sum of magnitudes
    assert torch.all((stats.sum() - x.sum(0)).abs() <= 2 * n * 2.0**-53 * x.abs().sum(0))
    # at most n products and n sums in fp32, of terms bounded by |x|^T |x|
    bound = x.abs().T @ x.abs() * (EPS * (n + 4)) + 1e-30
    ours = stats.second_moment()
    assert torch.equal(ours, ours.T)
    assert torch.all((ours.double() - x.T @ x).abs() <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (37, 64), (700, 33), (1, 300), (1100, 46)])
def test_stats(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    stats = _C.ActivationStats(shape[1])
    cut = shape[0] // 3
    stats.update(x[:cut])
    stats.second_moment()  # looking in between changes nothing
    stats.update(x[cut:])
    assert_stats(stats, x.double())


@MANY
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "leading", "transposed", "strided", "expanded"]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_stats_any(rows: int, k: int, dtype: torch.dtype, layout: str, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    x = {
        "plain": lambda: make(rows, k),
        "leading": lambda: make(2, rows, 3, k),
        "transposed": lambda: make(k, rows).T,
        "strided": lambda: make(rows * 2, k * 3)[::2, ::3],
        "expanded": lambda: make(1, k).expand(rows, k),
    }[layout]()
    mask = torch.rand(x.shape[:-1], generator=generator) < 0.6 if masked else None
    stats = _C.ActivationStats(in_features=k)
    stats.update(x, mask=mask)
    flat = x.reshape(-1, k)
    assert_stats(stats, (flat[mask.reshape(-1)] if masked else flat).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_add_row_after_row(dtype: torch.dtype) -> None:
    """fp64 sums are those of adding one row at a time, bit for bit, whatever an instruction set reads at once."""
    x = torch.randn(21, 700).to(dtype)
    total, magnitude = torch.zeros(700).double(), torch.zeros(700).double()
    for row in x.double():
        total += row
        magnitude += row.abs()
    stats = _C.ActivationStats(700)
    stats.update(x[:10])
    stats.update(x[10:])
    assert torch.equal(stats.sum(), total)
    assert torch.equal(stats.abs_sum(), magnitude)


def test_stats_without_rows() -> None:
    stats = _C.ActivationStats(3)
    stats.update(torch.empty(0, 3))
    stats.update(torch.ones(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    assert stats.rows == 0
    assert not stats.second_moment().any()
    assert not stats.sum().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_show_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(10, 50).to(dtype)
    x[4, 7] = value
    stats = _C.ActivationStats(50)
    stats.update(x)
    expected = torch.zeros(50, dtype=torch.bool)
    expected[7] = True
    assert torch.equal(~stats.sum().isfinite(), expected)
    assert torch.equal(~stats.abs_sum().isfinite(), expected)
    assert torch.equal(~stats.second_moment().isfinite(), expected[:, None] | expected)


# --- threads ---------------------------------------------------------------------------------------------------


def test_threads_do_not_change_a_bit() -> None:
    weight, x = torch.randn(150, 600).bfloat16(), torch.randn(300, 600).bfloat16()
    g, candidates, error = moment(600), torch.rand(3, 600) + 0.5, torch.randn(200, 600)

    def everything() -> list[Tensor]:
        stats = _C.ActivationStats(600)
        stats.update(x)
        stats.update(x.float())
        weighted = _C.ActivationStats(600)
        weighted.update(x, weights=torch.linspace(0, 3, 300))
        return [
            *_C.quantize_weight(weight, 128),
            _C.quadratic_loss(error, g),
            _C.scale_losses(weight, candidates, g, 128),
            _C.scale_losses(weight, candidates, g, 128, max_rows=50),
            _C.search_clip(weight, g, torch.tensor([1.0, 0.8]), 128),
            stats.sum(),
            stats.abs_sum(),
            stats.second_moment(),
            weighted.sum(),
            weighted.abs_sum(),
            weighted.second_moment(),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same(tuple(everything()), tuple(one))
    finally:
        torch.set_num_threads(before)


# --- errors ----------------------------------------------------------------------------------------------------

W, G4 = torch.zeros(4, 8), torch.eye(8)
ERRORS = {
    "1-D weight": (lambda: _C.quantize_weight(torch.zeros(8), 4), ValueError, "argument 'weight'"),
    "empty weight": (lambda: _C.quantize_weight(torch.zeros(0, 8), 4), ValueError, "at least one row"),
    "integer weight": (lambda: _C.quantize_weight(W.int(), 4), TypeError, "float32, float16 or bfloat16, got Int"),
    "double weight": (lambda: _C.quantize_weight(W.double(), 4), TypeError, "got Double"),
    "device": (lambda: _C.quantize_weight(W.to("meta"), 4), ValueError, "CPU, got meta"),
    "sparse": (lambda: _C.quantize_weight(W.to_sparse(), 4), ValueError, "dense"),
    "group 0": (lambda: _C.quantize_weight(W, 0), ValueError, "'group_size'.*got 0"),
    "bits": (lambda: _C.quantize_weight(W, 4, bits=9), ValueError, "'bits'.*2 to 8, got 9"),
    "scale dtype": (lambda: _C.quantize_weight(W, 4, scale_dtype=torch.float32), TypeError, "'scale_dtype'"),
    "channel_scale": (lambda: _C.quantize_weight(W, 4, channel_scale=torch.ones(7)), ValueError, "'channel_scale'"),
    "clip": (lambda: _C.quantize_weight(W, 4, clip=torch.ones(4, 3)), ValueError, r"shape \[4, 2\].*\[4, 3\]"),
    "codes": (lambda: _C.dequantize_weight(W, W, W, 4), TypeError, "'codes'"),
    "scales": (lambda: _C.dequantize_weight(W.byte(), W, W, 4), ValueError, "'scales'"),
    "codes of 16": (lambda: _C.pack_int4(torch.full((1, 2), 16).byte()), ValueError, "codes below 16, got 16"),
    "packed": (lambda: _C.unpack_int4(torch.zeros(2, 3).byte(), 8), ValueError, "'packed'"),
    "error dtype": (lambda: _C.quadratic_loss(W.half(), G4), TypeError, "'error'"),
    "moment": (lambda: _C.quadratic_loss(W, torch.eye(7)), ValueError, "'second_moment'"),
    "candidates": (lambda: _C.scale_losses(W, torch.ones(8), G4, 4), ValueError, "'candidates'"),
    "max_rows": (lambda: _C.scale_losses(W, torch.ones(1, 8), G4, 4, max_rows=-1), ValueError, "'max_rows'"),
    "ratios": (lambda: _C.search_clip(W, G4, torch.ones(2, 2), 4), ValueError, "'ratios'"),
    "in_features": (lambda: _C.ActivationStats(0), ValueError, "positive"),
    "stats device": (lambda: _C.ActivationStats(8, device="meta"), ValueError, "'device'.*got meta"),
    "x": (lambda: _C.ActivationStats(7).update(W), ValueError, "last dimension of 7"),
    "x dtype": (lambda: _C.ActivationStats(8).update(W.long()), TypeError, "'x'"),
    "mask dtype": (lambda: _C.ActivationStats(8).update(W, torch.ones(4)), TypeError, "Bool"),
    "mask": (lambda: _C.ActivationStats(8).update(W, torch.ones(3).bool()), ValueError, "4 elements"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
