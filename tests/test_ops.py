"""torch.ops.awq_ext.int4_linear: values, gradients, shapes, registration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from awq_ext import _C, backend, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 3, 8, 9, 100]  # below and above the number at which the weight is decoded whole


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def layer(n: int, k: int, group_size: int, scale_dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n * 1000 + k)
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k), group_size, scale_dtype=scale_dtype)
    return _C.pack_int4(codes), scales, zeros


def tolerance(x: Tensor, parts: tuple[Tensor, Tensor, Tensor], group_size: int) -> Tensor:
    """Bound of |y - y_ref|: fp32 sums of K terms on both sides, plus, for a 16-bit x, the rounding of every factor
    (weight, scaled x) and of the result to its precision u: (3 u + 2 K 2^-24) sum |x| |w|."""
    k = x.shape[-1]
    weight = reference.dequantize_weight(reference.unpack_int4(parts[0], k), *parts[1:], group_size).abs()
    unit = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    return (x.float().abs() @ weight.T) * (3 * unit + 2 * (k + 8) * 2.0**-24) + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 1, -1), (5, 13, -1), (7, 13, 7), (9, 576, 128), (300, 70, 32)])
@pytest.mark.parametrize("extras", [False, True])
def test_int4_linear(isa: str, dtype: torch.dtype, n: int, k: int, group_size: int, extras: bool) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        parts = layer(n, k, group_size, scale_dtype)
        bias = torch.randn(n).to(dtype) if extras else None
        pre = torch.rand(k) + 0.5 if extras else None
        for rows in ROWS:
            x = torch.randn(rows, k).to(dtype)
            args = (x, *parts, bias, pre, group_size)
            ours, expected = ops.int4_linear(*args), reference.int4_linear(*args)
            assert ours.dtype == dtype
            assert ours.shape == expected.shape
            bound = tolerance(x * 1.5 if extras else x, parts, group_size)
            if extras:
                bound = bound + (bias.float().abs() + bound) * 2 * torch.finfo(dtype).eps
            assert torch.all((ours.float() - expected.float()).abs() <= bound)


def test_leading_dimensions_and_strides() -> None:
    parts = layer(6, 20, 8)
    x = torch.randn(20, 3, 5).permute(1, 2, 0)
    torch.testing.assert_close(
        ops.int4_linear(x, *parts, None, None, 8), reference.int4_linear(x, *parts, None, None, 8)
    )
    one = torch.randn(20)
    assert ops.int4_linear(one, *parts, None, None, 8).shape == (6,)
    assert ops.int4_linear(torch.empty(0, 4, 20), *parts, None, None, 8).shape == (0, 4, 6)


def test_threads_do_not_change_a_bit() -> None:
    parts, x, before = layer(300, 640, 128), torch.randn(5, 640), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.int4_linear(x, *parts, None, None, 128))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("dtype", "rows", "extras"), [(torch.float32, 2, True), (torch.bfloat16, 40, False), (torch.float16, 2, False)]
)
def test_opcheck(dtype: torch.dtype, rows: int, extras: bool) -> None:
    parts = layer(6, 20, 8)
    x = torch.randn(2, rows, 20, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True) if extras else None
    pre = torch.rand(20) + 0.5 if extras else None
    torch.library.opcheck(torch.ops.awq_ext.int4_linear.default, (x, *parts, bias, pre, 8))


@pytest.mark.parametrize("rows", [(), (3,), (2, 30)])
@pytest.mark.parametrize("extras", [False, True])
def test_gradients(rows: tuple[int, ...], extras: bool) -> None:
    parts = layer(6, 20, 8)
    pre = torch.rand(20) + 0.5 if extras else None
    direction = torch.randn(*rows, 6)
    grads = []
    for function in (ops.int4_linear, reference.int4_linear):
        torch.manual_seed(3)
        x = torch.randn(*rows, 20, requires_grad=True)
        bias = torch.randn(6, requires_grad=True) if extras else None
        function(x, *parts, bias, pre, 8).backward(direction)
        grads.append([x.grad] + ([bias.grad] if extras else []))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradient_by_differences() -> None:
    """The layer is linear in x: a difference over any step is the directional derivative, up to fp32 rounding."""
    parts, pre = layer(6, 20, 8), torch.rand(20) + 0.5
    x = torch.randn(4, 20, requires_grad=True)
    y = ops.int4_linear(x, *parts, None, pre, 8)
    y.sum().backward()
    step = torch.randn(4, 20)
    moved = ops.int4_linear(x.detach() + step, *parts, None, pre, 8)
    torch.testing.assert_close((moved - y.detach()).sum(), (x.grad * step).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gradient_keeps_its_dtype(dtype: torch.dtype) -> None:
    parts, bias = layer(6, 20, 8), torch.zeros(6, requires_grad=True)
    x = torch.randn(3, 20, dtype=dtype, requires_grad=True)
    ops.int4_linear(x, *parts, bias, None, 8).sum().backward()
    assert bias.grad.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(bias.grad, torch.full((6,), 3.0))


def test_fake_tensors_and_meta() -> None:
    parts = layer(6, 20, 8)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in parts]
        y = ops.int4_linear(torch.empty(2, 3, 20, dtype=torch.float16), *fakes, None, None, 8)
    assert y.shape == (2, 3, 6)
    assert y.dtype == torch.float16
    meta = ops.int4_linear(torch.empty(2, 20, device="meta"), *(t.to("meta") for t in parts), None, None, 8)
    assert meta.shape == (2, 6)


def test_no_dispatch_for_autocast_surprises() -> None:
    parts, x = layer(6, 20, 8), torch.randn(3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.int4_linear(x, *parts, None, None, 8).dtype == torch.float32


GOOD = layer(6, 20, 8)
ERRORS = {
    "x": ((torch.zeros(2, 22), *GOOD, None, None, 8), ValueError, "'qweight'"),
    "x dtype": ((torch.zeros(2, 20).double(), *GOOD, None, None, 8), TypeError, "'x'.*got Double"),
    "qweight dtype": ((torch.zeros(2, 20), GOOD[0].int(), *GOOD[1:], None, None, 8), TypeError, "'qweight'"),
    "scales": ((torch.zeros(2, 20), GOOD[0], GOOD[1][:, :2], GOOD[2], None, None, 8), ValueError, "'scales'"),
    "zeros": ((torch.zeros(2, 20), *GOOD[:2], GOOD[2].int(), None, None, 8), TypeError, "'zeros'"),
    "bias": ((torch.zeros(2, 20), *GOOD, torch.zeros(5), None, 8), ValueError, "'bias'"),
    "pre": ((torch.zeros(2, 20), *GOOD, None, torch.zeros(5), 8), ValueError, "'pre_quant_scale'"),
    "group": ((torch.zeros(2, 20), *GOOD, None, None, 0), ValueError, "'group_size'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    args, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        ops.int4_linear(*args)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQ_EXT_BACKEND", raising=False)
    assert backend.kernels_for("cpu") is _C
    assert backend.kernels_for(torch.device("meta")) is reference
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")
    assert backend.kernels_for("cpu") is reference
    monkeypatch.setenv("AWQ_EXT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="AWQ_EXT_BACKEND: expected one of compiled, reference, got 'cuda'"):
        backend.kernels_for("cpu")
