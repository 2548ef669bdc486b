"""The Linear for many rows by wgmma, on the emulated GPU: against the reference, and when it is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import emulated_gpu
import pytest
import torch
from linear_cases import bound, tiled
from programs import run_python, seeing_tests

from awq_ext.kernels import cuda, reference
from awq_ext.kernels.cuda import library

# (out_features, in_features, group size): outputs that fill no tile, short last groups and stages, stages that outnumber buffers
CASES = [(1, 8, -1), (33, 152, 64), (130, 160, 32), (97, 330, -1), (70, 96, 96), (40, 616, 128), (5, 70, 31)]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def products(gpu: library.Library) -> Callable[[], int]:
    """Say how many products a warpgroup has started since the last question."""
    count = gpu._functions.awq_emulated_products
    last = count()

    def since() -> int:
        nonlocal last
        before, last = last, count()
        return last - before

    return since


def case(rows: int, n: int, k: int, group_size: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    """Compare one product with the reference, with a bias and an input scale or without."""
    parts = tiled(n, k, group_size, bits, (torch.float16, torch.bfloat16)[seed % 2], symmetric=seed % 4 > 1)
    x = torch.randn(rows, k).to(dtype)
    bias = torch.randn(n).to((torch.float32, *DTYPES)[seed % 3]) if seed % 3 != 1 else None
    pre = torch.rand(k) + 0.5 if seed % 3 == 2 else None
    ours, expected = (f.quant_linear(x, *parts, bias, pre, k, n, group_size, bits) for f in (cuda, reference))
    weight = reference.quant_weight(*parts, k, n, group_size, bits)
    assert ours.dtype == dtype
    assert ((ours.float() - expected.float()).abs() <= bound(x, weight, bias, pre)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
def test_the_product(
    n: int, k: int, group_size: int, dtype: torch.dtype, bits: int, products: Callable[[], int]
) -> None:
    """Rows for both sizes of a block, which they fill or do not."""
    for seed, rows in enumerate((17, 64, 65, 130)):
        case(rows, n, k, group_size, bits, dtype, seed)
        assert products() > 0


@pytest.mark.parametrize(("n", "k", "group_size", "parts"), [(40, 1160, 128, 4), (129, 600, -1, 2), (33, 840, 32, 3)])
def test_channels_in_parts(n: int, k: int, group_size: int, parts: int) -> None:
    """Few outputs and rows leave most multiprocessors idle, so blocks share the channels, whose last part is shorter."""
    assert library.value("linear_parts", 40, n, k, k if group_size == -1 else group_size) == parts
    for seed, dtype in enumerate(DTYPES):
        case(40, n, k, group_size, 4, dtype, seed)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows(bits: int) -> None:
    for seed, dtype in enumerate(DTYPES):
        case(513, 140, 200, 64, bits, dtype, seed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [50, 140])
def test_integers_are_exact(rows: int, dtype: torch.dtype, bits: int) -> None:
    """With integer activations and scales of powers of two every sum is an integer below 2^24: nothing may be off at all."""
    n, k, group = 150, 424, 64
    parts = tiled(n, k, group, bits)
    parts = parts[0], torch.exp2(torch.randint(-2, 3, parts[1].shape)).half(), parts[2]
    weight = reference.quant_weight(*parts, k, n, group, bits)
    x = torch.randint(-1, 2, (rows, k)).to(dtype)
    ours = cuda.quant_linear(x, *parts, None, None, k, n, group, bits)
    assert torch.equal(ours, (x.double() @ weight.double().T).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_neither_threads_nor_copies_may_run_in_another_order(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier would show, and a buffer that is given back too soon: there are more stages than buffers.

    "lowest" and "highest" let warps get as far ahead of others as barriers allow.
    """
    n, k, group = 140, 600, 32
    parts, x, results = tiled(n, k, group, bits), torch.randn(70, k).bfloat16(), []
    for order in ("ascending", "descending", "lowest", "highest"):
        for copies in ("late", "early"):
            monkeypatch.setenv("AWQ_EMULATED_ORDER", order)
            monkeypatch.setenv("AWQ_EMULATED_COPIES", copies)
            results.append(cuda.quant_linear(x, *parts, None, None, k, n, group, bits))
    assert all(torch.equal(results[0], result) for result in results)


def test_values_that_are_not_numbers_stay_in_their_rows() -> None:
    """Padding is multiplied by zeros, and other rows by nothing of this one."""
    n, k, group = 40, 152, 64
    parts, x = tiled(n, k, group, 4), torch.randn(70, k).half()
    clean = cuda.quant_linear(x, *parts, None, None, k, n, group, 4)
    x[5], x[66, -1] = float("inf"), float("nan")
    y = cuda.quant_linear(x, *parts, None, None, k, n, group, 4)
    other = [row for row in range(70) if row not in (5, 66)]
    assert torch.equal(y[other], clean[other])
    assert y[66].isnan().all()


@pytest.mark.parametrize(
    ("rows", "group_size", "wish"),
    [(16, 64, None), (40, 16, None), (40, 7, None), (40, 64, "0")],
)
def test_when_it_is_not_taken(
    rows: int, group_size: int, wish: str | None, products: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wish is not None:
        monkeypatch.setenv("AWQ_EXT_CUDA_WGMMA", wish)
    case(rows, 33, 192, group_size, 4, torch.float16, 0)
    assert products() == 0
    assert library.value("wgmma", 17) == (wish is None)
    assert library.value("wgmma", 16) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_no_outputs(bits: int) -> None:
    """A tensor map of no codes would be refused."""
    none = (
        torch.zeros(0, 16, 16 * bits, dtype=torch.uint8),
        torch.zeros(0, 1, 32).half(),
        torch.zeros(0, 1, 4 * bits, dtype=torch.uint8),
    )
    x = torch.randn(20, 64).half()
    assert cuda.quant_linear(x, *none, None, None, 64, 0, -1, bits).shape == (20, 0)


def test_it_stays_within_its_arguments() -> None:
    """As all kernels do (test_bounds.py), on arguments that end at a page that cannot be touched."""
    emulated_gpu.load()
    done = run_python(str(Path(__file__).with_name("guarded.py")), "wgmma", **seeing_tests())
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 48
