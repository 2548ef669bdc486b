"""The Linear and the weight on the emulated GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from linear_cases import NAMES, bound, tiled

from awq_ext.kernels import cuda, reference
from awq_ext.kernels.cuda import library

# (out_features, in_features, group size): short last groups, padded steps, groups that no product of 16 channels fits
CASES = [(1, 1, -1), (5, 13, -1), (7, 13, 7), (9, 296, 128), (70, 70, 32), (33, 160, 16), (130, 152, 64), (40, 330, -1)]
ROWS = [1, 3, 8, 11, 17, 33]  # for every kernel, and blocks of rows that are not full
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def basic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of every GPU, group size and number of rows: test_wgmma.py has the one for Hopper."""
    monkeypatch.setenv("AWQ_EXT_CUDA_WGMMA", "0")
    monkeypatch.setenv("AWQ_EXT_CUDA_FEW", "0")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of linear_few.h, where it can be used."""
    monkeypatch.delenv("AWQ_EXT_CUDA_FEW")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
def test_quant_linear(dtype: torch.dtype, n: int, k: int, group_size: int, bits: int) -> None:
    for i, rows in enumerate(ROWS):
        scale_dtype = (torch.float16, torch.bfloat16)[i % 2]
        extras = i % 3 != 0
        parts = tiled(n, k, group_size, bits, scale_dtype, symmetric=i % 4 > 1)
        x = torch.randn(rows, k).to(dtype)
        bias = torch.randn(n).to(DTYPES[i % 3]) if extras else None
        pre = torch.rand(k) + 0.5 if extras and i % 2 else None
        ours, expected = (f.quant_linear(x, *parts, bias, pre, k, n, group_size, bits) for f in (cuda, reference))
        assert ours.dtype == dtype
        assert ours.shape == expected.shape
        weight = reference.quant_weight(*parts, k, n, group_size, bits)
        assert ((ours.float() - expected.float()).abs() <= bound(x, weight, bias, pre)).all(), (rows, scale_dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size", "parts"), [(40, 1160, 128, 4), (129, 600, -1, 2), (33, 840, 48, 3)])
def test_channels_in_parts(n: int, k: int, group_size: int, parts: int, bits: int) -> None:
    """Few outputs and rows leave most multiprocessors idle, so blocks share the channels. Groups may go on in another part."""
    assert library.value("linear_parts", 40, n, k, k if group_size == -1 else group_size) == parts
    for i, dtype in enumerate(DTYPES[1:]):
        weight_parts = tiled(n, k, group_size, bits, DTYPES[1 + i], symmetric=i > 0)
        x, bias = torch.randn(40, k).to(dtype), torch.randn(n)
        args = (*weight_parts, bias, None, k, n, group_size, bits)
        ours, expected = (f.quant_linear(x, *args) for f in (cuda, reference))
        weight = reference.quant_weight(*weight_parts, k, n, group_size, bits)
        assert ((ours.float() - expected.float()).abs() <= bound(x, weight, bias, None)).all()


# Weights for linear_few.h: groups of 1, 2, 3 and 4 pairs and more, short last ones, one group a row; rings that go round and that
# do not fill; fewer stages than warps; more tiles than 132, which halves the warps
FEW = [(5, 32, -1), (33, 96, 32), (40, 320, 64), (64, 1152, 128), (70, 480, 96), (31, 2560, 256), (32, 6144, -1)]
FEW += [(9, 4192, 32), (8, 8320, 128), (8, 1088, 128), (4250, 384, 32)]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), FEW)
def test_few_rows_of_regular_weights(n: int, k: int, group_size: int, bits: int) -> None:
    for i, rows in enumerate((1, 3, 8, 9, 16, 17, 32)[:: 1 if n < 4000 else 3]):
        assert library.value("few", rows, n, k, k if group_size == -1 else group_size) == 1
        dtype = DTYPES[1 + (i + bits // 4) % 2]
        parts = tiled(n, k, group_size, bits, DTYPES[1 + i // 2 % 2], symmetric=i % 4 > 1)
        x = torch.randn(rows, k).to(dtype)
        bias = torch.randn(n).to(DTYPES[i % 3]) if i % 2 else None
        pre = torch.rand(k) + 0.5 if i % 3 == 2 else None
        ours, expected = (f.quant_linear(x, *parts, bias, pre, k, n, group_size, bits) for f in (cuda, reference))
        weight = reference.quant_weight(*parts, k, n, group_size, bits)
        assert ((ours.float() - expected.float()).abs() <= bound(x, weight, bias, pre)).all(), rows


@pytest.mark.parametrize(("wish", "rows", "group_size"), [("0", 1, 64), ("1", 33, 64), ("1", 1, 16), ("1", 1, 48)])
def test_when_few_rows_go_to_the_other_kernel(
    wish: str, rows: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQ_EXT_CUDA_FEW", wish)
    assert library.value("few", rows, 64, 192, group_size) == 0


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("bits", [4, 8])
def test_no_buffer_is_given_back_too_soon(bits: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that are done as late and as early as they may be give the same, in every order of threads."""
    for n, k, group in ((8, 10240, 128), (8, 5120, 32)):  # stages that outnumber the ring's in every kernel
        parts = tiled(n, k, group, bits)
        for rows in (2, 12, 20):
            x = torch.randn(rows, k).half()
            results = []
            for copies, asked in (("late", order), ("early", order), ("late", "ascending")):
                monkeypatch.setenv("AWQ_EMULATED_COPIES", copies)
                monkeypatch.setenv("AWQ_EMULATED_ORDER", asked)
                results.append(cuda.quant_linear(x, *parts, None, None, k, n, group, bits))
            assert torch.equal(results[0], results[2])
            assert torch.equal(results[1], results[2])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [128, 2048])
def test_every_code_and_zero_is_exact(dtype: torch.dtype, bits: int, k: int) -> None:
    """Unit vectors as activations and scales of 1 show code - zero, of zeros from 0 to the largest."""
    levels, n = 2**bits, 64
    codes = (torch.arange(n)[:, None] * 37 + torch.arange(k)).remainder(levels).to(torch.uint8)
    zeros = (torch.arange(n)[:, None] * (levels - 1) // (n - 1)).expand(n, k // 128).to(torch.uint8).contiguous()
    parts = (
        reference.tile_codes(cuda.pack_int4(codes) if bits == 4 else codes, k, 128, bits),
        reference.tile_scales(torch.ones(n, k // 128).half()),
        reference.tile_zeros(zeros, bits),
    )
    x = torch.eye(k)[torch.arange(32) * (k // 32) + torch.arange(32) % (k // 32)].to(dtype)
    expected = (x.double() @ (codes.double() - zeros.double().repeat_interleave(128, 1)).T).to(dtype)
    for rows in (8, 16, 32):
        assert torch.equal(cuda.quant_linear(x[:rows], *parts, None, None, k, n, 128, bits), expected[:rows])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_are_exact(dtype: torch.dtype, bits: int) -> None:
    """With integer activations and scales of powers of two every sum is an integer below 2^24: nothing may be off at all."""
    n, k, group = 40, 200, 64
    parts = tiled(n, k, group, bits)
    parts = parts[0], torch.exp2(torch.randint(-2, 3, parts[1].shape)).half(), parts[2]
    weight = reference.quant_weight(*parts, k, n, group, bits)
    for rows in (1, 40):
        x = torch.randint(-1, 2, (rows, k)).to(dtype)
        ours = cuda.quant_linear(x, *parts, None, None, k, n, group, bits)
        assert torch.equal(ours, (x.double() @ weight.double().T).to(dtype))


@pytest.mark.parametrize("rows", [2, 12, 40])
def test_the_order_of_threads_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier would."""
    n, k, group = 40, 264, 64
    results = []
    parts, x = tiled(n, k, group, 4), torch.randn(rows, k).bfloat16()
    for order in ("ascending", "descending"):
        monkeypatch.setenv("AWQ_EMULATED_ORDER", order)
        results.append([cuda.quant_linear(x.to(d), *parts, None, None, k, n, group, 4) for d in DTYPES])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
def test_quant_weight(n: int, k: int, group_size: int, bits: int) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        args = (*tiled(n, k, group_size, bits, scale_dtype), k, n, group_size, bits)
        exact = reference.quant_weight(*args)
        assert torch.equal(cuda.quant_weight(*args), exact)
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(cuda.quant_weight(*args, dtype), exact.to(dtype))


def test_any_shape_of_activations() -> None:
    parts = tiled(12, 24, 8, 4)
    wide = torch.randn(2, 3, 48).bfloat16()
    for x in (wide[0, 0, :24], wide[..., ::2], wide[:0, :, :24], wide[..., 3:27]):
        ours, expected = (f.quant_linear(x, *parts, None, None, 24, 12, 8, 4) for f in (cuda, reference))
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-2)
    none = (
        torch.zeros(0, 2, 64, dtype=torch.uint8),
        torch.zeros(0, 1, 32).half(),
        torch.zeros(0, 1, 16, dtype=torch.uint8),
    )
    assert cuda.quant_linear(torch.randn(3, 5).half(), *none, None, None, 5, 0, -1, 4).shape == (3, 0)


def test_int8_rounds_activations_as_the_reference_does() -> None:
    parts = tiled(12, 72, 32, 4)
    for rows in (3, 40):
        x = torch.randn(rows, 72)
        args = (*parts, None, None, 72, 12, 32, 4, "int8")
        torch.testing.assert_close(cuda.quant_linear(x, *args), reference.quant_linear(x, *args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(2, 23)}, ValueError, r"'x': expected shape \[2, 24\], got \[2, 23\]"),
        (
            {"x": torch.randn(2, 24).double()},
            TypeError,
            "'x': expected float32 or float16 or bfloat16, got torch.float64",
        ),
        ({"tiles": torch.zeros(1, 6, 32, dtype=torch.uint8)}, ValueError, r"'tiles': expected shape \[1, 6, 64\]"),
        ({"tiles": torch.zeros(1, 6, 64)}, TypeError, "'tiles': expected uint8"),
        ({"scales": torch.zeros(1, 3, 32)}, TypeError, "'scales': expected float16 or bfloat16"),
        ({"zeros": torch.zeros(1, 2, 16, dtype=torch.uint8)}, ValueError, "'zeros': expected shape"),
        ({"bias": torch.zeros(13)}, ValueError, "'bias': expected shape"),
        ({"pre_quant_scale": torch.zeros(24).half()}, TypeError, "'pre_quant_scale': expected float32"),
        ({"bits": 5}, ValueError, "'bits': expected 4 or 8, got 5"),
        ({"group_size": 0}, ValueError, "'group_size': expected -1 or a positive number, got 0"),
        ({"compute_dtype": "fp8"}, ValueError, "'compute_dtype': expected 'auto' or 'int8', got 'fp8'"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], error: type[Exception], message: str) -> None:
    values = (torch.randn(2, 24), *tiled(12, 24, 8, 4), None, None, 24, 12, 8, 4)
    with pytest.raises(error, match=message):
        cuda.quant_linear(**(dict(zip(NAMES, values, strict=True)) | changes))
