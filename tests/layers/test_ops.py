"""torch.ops.awq_ext: values, gradients, shapes, registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from awq_ext import _C
from awq_ext import kernels as backend
from awq_ext.kernels import reference
from awq_ext.layers import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [4, 8]
ROWS = [*range(1, 17), 30, 100]  # every number of rows that a kernel is made for, and blocks of them


def tiled(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = _C.pack_int4(codes) if bits == 4 else codes
    tiles = _C.tile_codes(rows, codes.shape[1], group_size, bits)
    return tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)


def layer(
    n: int, k: int, group_size: int, scale_dtype: torch.dtype = torch.float16, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n * 1000 + k)
    parts = _C.quantize_weight(torch.randn(n, k), group_size, bits, scale_dtype=scale_dtype)
    return tiled(*parts, group_size, bits)


def call(
    function: Callable[..., Tensor],
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    pre: Tensor | None,
    n: int,
    group_size: int,
    compute_dtype: str = "auto",
) -> Tensor:
    bits = parts[0].shape[2] // 16
    return function(x, *parts, bias, pre, x.shape[-1], n, group_size, bits, compute_dtype)


def tolerance(x: Tensor, weight: Tensor) -> Tensor:
    """Bound of |y - y_ref|. Every product of x and code - zero is exact or rounded once, is multiplied by the scale once,
    and passes at most K sums, in fp32, on both sides: 2 (K + 4) 2^-24 sum |x| |w|. A 16-bit x multiplied by
    pre_quant_scale may be rounded to its precision u, and the result is: 2 u sum |x| |w|, u half an epsilon."""
    unit = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    return (x.float().abs() @ weight.abs().T) * (unit + 2 * (x.shape[-1] + 4) * 2.0**-24) * 1.01 + 1e-30


CASES = [
    *[(1, 1, -1), (5, 13, -1), (7, 13, 7), (9, 576, 128), (300, 70, 32), (33, 320, 16), (64, 300, 64), (40, 600, 256)],
    (65, 1100, -1),  # a group longer than a panel
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
@pytest.mark.parametrize("extras", [False, True])
def test_quant_linear(isa: str, dtype: torch.dtype, n: int, k: int, group_size: int, extras: bool, bits: int) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        parts = layer(n, k, group_size, scale_dtype, bits)
        weight = reference.quant_weight(*parts, k, n, group_size, bits)
        bias = torch.randn(n).to(dtype) if extras else None
        pre = torch.rand(k) + 0.5 if extras else None
        for rows in ROWS:
            x = torch.randn(rows, k).to(dtype)
            ours, expected = (call(f.quant_linear, x, parts, bias, pre, n, group_size) for f in (ops, reference))
            assert ours.dtype == dtype
            assert ours.shape == expected.shape
            bound = tolerance(x * 1.5 if extras else x, weight)
            if extras:
                bound = bound + (bias.float().abs() + bound) * 2 * torch.finfo(dtype).eps
            assert torch.all((ours.float() - expected.float()).abs() <= bound)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
@pytest.mark.parametrize("extras", [False, True])
def test_int8(isa: str, dtype: torch.dtype, n: int, k: int, group_size: int, extras: bool, bits: int) -> None:
    parts = layer(n, k, group_size, bits=bits)
    weight = reference.quant_weight(*parts, k, n, group_size, bits)
    bias = torch.randn(n).to(dtype) if extras else None
    pre = torch.rand(k) + 0.5 if extras else None
    for rows in ROWS:
        x = (torch.randn(rows, k) * 10 ** (2 * torch.rand(rows, 1) - 1)).to(dtype)
        ours, expected = (call(f.quant_linear, x, parts, bias, pre, n, group_size, "int8") for f in (ops, reference))
        assert ours.dtype == dtype
        q, scale = reference.int8_activations(x.float() if pre is None else x.float() * pre, group_size)
        # the integers are equal, so what differs are fp32 products and sums, and the rounding of both results to 16 bits
        bound = tolerance(q * scale, weight)
        if dtype != torch.float32:
            bound = bound + (expected.float().abs() + bound) * torch.finfo(dtype).eps
        assert torch.all((ours.float() - expected.float()).abs() <= bound)


def unit_layer(codes: Tensor, zeros: Tensor, group_size: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Weights code - zero: scales of 1. codes [N, K], zeros [N, G], uint8."""
    return tiled(codes, torch.ones(zeros.shape).half(), zeros, group_size, bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group_size"), [(40, 16), (300, -1), (70, 7), (128, 128)])
def test_int8_activations_are_exact(isa: str, dtype: torch.dtype, k: int, group_size: int) -> None:
    """A unit matrix shows q * scale, rounded once on both sides."""
    parts = unit_layer(
        torch.eye(k, dtype=torch.uint8),
        torch.zeros(k, reference.group_count(k, group_size), dtype=torch.uint8),
        group_size,
    )
    x = torch.randn(40, k) * 10 ** torch.randn(40, 1)
    x[0], x[1], x[2], x[3] = 0, 1e-38, torch.arange(k) - k / 2 + 0.5, 1e-41
    x[4, ::3] = 127.0  # a scale of 1: halves are rounded to even
    x[4, 1::3] = torch.arange(len(x[4, 1::3])) % 100 + 0.5
    x = x.to(dtype)
    for pre in (None, torch.rand(k) + 0.5):
        q, scale = reference.int8_activations(x.float() if pre is None else x.float() * pre, group_size)
        assert q.abs().max() == 127
        assert torch.equal(call(ops.quant_linear, x, parts, None, pre, k, group_size, "int8"), (q * scale).to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(33, 13, -1), (7, 256, -1), (40, 256, 32), (64, 150, 30)])
def test_int8_sums_are_exact(isa: str, n: int, k: int, group_size: int, bits: int) -> None:
    """Integers all the way: every x is its own q, every scale 1, all sums below 2^24."""
    groups = reference.group_count(k, group_size)
    top = 2**bits - 1
    codes, zeros = torch.randint(0, top + 1, (n, k)), torch.randint(0, top + 1, (n, groups))
    codes[0], zeros[0], codes[-1], zeros[-1] = top, 0, 0, top
    weight = codes - reference.expand_groups(zeros, k, group_size)
    for rows in ROWS:
        x = torch.randint(-127, 128, (rows, k))
        x[0] = 127
        x[:, :: reference.group_length(k, group_size)] = 127
        ours = call(
            ops.quant_linear,
            x.float(),
            unit_layer(codes.byte(), zeros.byte(), group_size, bits),
            None,
            None,
            n,
            group_size,
            "int8",
        )
        assert torch.equal(ours, (x @ weight.T).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_shows_what_is_not_finite(isa: str, dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3, 70).to(dtype)
    x[1, 66] = value
    y = call(ops.quant_linear, x, layer(9, 70, 32), None, None, 9, 32, "int8")
    assert torch.equal(y.isnan(), torch.tensor([[False], [True], [False]]).expand(3, 9))


def test_int8_gradients_are_those_of_the_weight() -> None:
    parts, pre, direction = layer(6, 20, 8), torch.rand(20) + 0.5, torch.randn(4, 6)
    grads = []
    for compute_dtype in ("auto", "int8"):
        torch.manual_seed(3)
        x, bias = torch.randn(4, 20, requires_grad=True), torch.randn(6, requires_grad=True)
        call(ops.quant_linear, x, parts, bias, pre, 6, 8, compute_dtype).backward(direction)
        grads.append((x.grad, bias.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_weights_that_are_zero_give_zero(isa: str, bits: int, share: float) -> None:
    """code == zero contributes nothing, whatever the activations: no cancellation of large sums."""
    code = round(share * (2**bits - 1))
    codes, zeros = torch.full((40, 64), code, dtype=torch.uint8), torch.full((40, 2), code, dtype=torch.uint8)
    parts = tiled(codes, torch.rand(40, 2).half(), zeros, 32, bits)
    for dtype in DTYPES:
        for rows in ROWS:
            x = (torch.randn(rows, 64) * 1e4).to(dtype)
            for compute_dtype in ("auto", "int8"):
                y = call(ops.quant_linear, x, parts, None, None, 40, 32, compute_dtype)
                assert torch.equal(y, torch.zeros(rows, 40, dtype=dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_exact(isa: str, dtype: torch.dtype, bits: int) -> None:
    """A unit matrix of activations shows code - zero: channel k has code k, output n has zero n."""
    every = torch.arange(2**bits)
    codes, zeros = every.expand(len(every), -1), every[:, None]
    parts = unit_layer(codes.byte(), zeros.byte(), -1, bits)
    for rows in (1, len(every)):
        x = torch.eye(len(every))[-rows:].to(dtype)
        found = call(ops.quant_linear, x, parts, None, None, len(every), -1)
        assert torch.equal(found.float(), (codes - zeros).T[-rows:].float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), CASES)
def test_quant_weight(isa: str, n: int, k: int, group_size: int, bits: int) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        args = (*layer(n, k, group_size, scale_dtype, bits), k, n, group_size, bits)
        assert torch.equal(ops.quant_weight(*args), reference.quant_weight(*args))


def test_leading_dimensions_and_strides() -> None:
    parts = layer(6, 20, 8)
    x = torch.randn(20, 3, 5).permute(1, 2, 0)
    torch.testing.assert_close(
        call(ops.quant_linear, x, parts, None, None, 6, 8), call(reference.quant_linear, x, parts, None, None, 6, 8)
    )
    one = torch.randn(20)
    assert call(ops.quant_linear, one, parts, None, None, 6, 8).shape == (6,)
    assert call(ops.quant_linear, torch.empty(0, 4, 20), parts, None, None, 6, 8).shape == (0, 4, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40, 150, 301])
@pytest.mark.parametrize("compute_dtype", ["auto", "int8"])
@pytest.mark.parametrize("bits", BITS)
def test_threads_do_not_change_a_bit(isa: str, compute_dtype: str, rows: int, dtype: torch.dtype, bits: int) -> None:
    parts, x, before = layer(300, 640, 128, bits=bits), torch.randn(rows, 640).to(dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(ops.quant_linear, x, parts, None, None, 300, 128, compute_dtype))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# torch 2.14 means to hide its own warning, which a filter that turns warnings into errors undoes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("dtype", "rows", "extras"), [(torch.float32, 2, True), (torch.bfloat16, 40, False), (torch.float16, 2, False)]
)
@pytest.mark.parametrize("compute_dtype", ["auto", "int8"])
@pytest.mark.parametrize("bits", BITS)
def test_opcheck(dtype: torch.dtype, rows: int, extras: bool, compute_dtype: str, bits: int) -> None:
    parts = layer(6, 20, 8, bits=bits)
    x = torch.randn(2, rows, 20, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True) if extras else None
    pre = torch.rand(20) + 0.5 if extras else None
    torch.library.opcheck(torch.ops.awq_ext.quant_linear.default, (x, *parts, bias, pre, 20, 6, 8, bits, compute_dtype))


@pytest.mark.parametrize("bits", BITS)
def test_opcheck_of_the_weight(bits: int) -> None:
    torch.library.opcheck(torch.ops.awq_ext.quant_weight.default, (*layer(6, 20, 8, bits=bits), 20, 6, 8, bits))


@pytest.mark.parametrize("rows", [(), (3,), (2, 30)])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gradients(rows: tuple[int, ...], extras: bool, bits: int) -> None:
    parts = layer(6, 20, 8, bits=bits)
    pre = torch.rand(20) + 0.5 if extras else None
    direction = torch.randn(*rows, 6)
    grads = []
    for function in (ops.quant_linear, reference.quant_linear):
        torch.manual_seed(3)
        x = torch.randn(*rows, 20, requires_grad=True)
        bias = torch.randn(6, requires_grad=True) if extras else None
        call(function, x, parts, bias, pre, 6, 8).backward(direction)
        grads.append([x.grad] + ([bias.grad] if extras else []))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradient_by_differences() -> None:
    """The layer is linear in x: a difference over any step is the directional derivative, up to fp32 rounding."""
    parts, pre = layer(6, 20, 8), torch.rand(20) + 0.5
    x = torch.randn(4, 20, requires_grad=True)
    y = call(ops.quant_linear, x, parts, None, pre, 6, 8)
    y.sum().backward()
    step = torch.randn(4, 20)
    moved = call(ops.quant_linear, x.detach() + step, parts, None, pre, 6, 8)
    torch.testing.assert_close((moved - y.detach()).sum(), (x.grad * step).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gradient_keeps_its_dtype(dtype: torch.dtype) -> None:
    parts, bias = layer(6, 20, 8), torch.zeros(6, requires_grad=True)
    x = torch.randn(3, 20, dtype=dtype, requires_grad=True)
    call(ops.quant_linear, x, parts, bias, None, 6, 8).sum().backward()
    assert bias.grad.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(bias.grad, torch.full((6,), 3.0))


@pytest.mark.parametrize("bits", BITS)
def test_fake_tensors_and_meta(bits: int) -> None:
    parts = layer(6, 20, 8, bits=bits)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in parts]
        y = call(ops.quant_linear, torch.empty(2, 3, 20, dtype=torch.float16), fakes, None, None, 6, 8)
    assert y.shape == (2, 3, 6)
    assert y.dtype == torch.float16
    meta = call(
        ops.quant_linear, torch.empty(2, 20, device="meta"), tuple(t.to("meta") for t in parts), None, None, 6, 8
    )
    assert meta.shape == (2, 6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_autocast_casts_the_input_as_for_a_linear(trained: bool, bits: int) -> None:
    parts, x = layer(6, 20, 8, bits=bits), torch.randn(3, 20, requires_grad=trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(ops.quant_linear, x, parts, None, None, 6, 8)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(ops.quant_linear, x.bfloat16(), parts, None, None, 6, 8))
    if trained:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


GOOD = (*layer(6, 20, 8), None, None, 20, 6, 8, 4, "auto")
ERRORS = {
    "x": ({0: torch.zeros(2, 22)}, ValueError, r"'x'.*\[\.\.\., 20\], got \[2, 22\]"),
    "x dtype": ({0: torch.zeros(2, 20).double()}, TypeError, "'x'.*got Double"),
    "tiles": ({1: GOOD[0][:, :2]}, ValueError, "'tiles'"),
    "tiles dtype": ({1: GOOD[0].int()}, TypeError, "'tiles'"),
    "scales": ({2: GOOD[1][:, :2]}, ValueError, "'scales'"),
    "scales dtype": ({2: GOOD[1].float()}, TypeError, "'scales'.*got Float"),
    "zeros": ({3: GOOD[2].int()}, TypeError, "'zeros'"),
    "bias": ({4: torch.zeros(5)}, ValueError, "'bias'"),
    "pre": ({5: torch.zeros(5)}, ValueError, "'pre_quant_scale'"),
    "out": ({7: 40}, ValueError, "'tiles'"),
    "group": ({8: 0}, ValueError, "'group_size'"),
    "bits": ({9: 3}, ValueError, "'bits': expected 4 or 8, got 3"),
    "bits of other tiles": ({9: 8}, ValueError, r"'tiles': expected shape \[1, 5, 128\]"),
    "compute": ({10: "int4"}, ValueError, "'compute_dtype': expected 'auto' or 'int8', got int4"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, kind, message = ERRORS[name]
    args = [torch.zeros(2, 20), *GOOD]
    for place, value in changes.items():
        args[place] = value
    with pytest.raises(kind, match=message):
        ops.quant_linear(*args)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQ_EXT_BACKEND", raising=False)
    assert backend.kernels_for("cpu") is _C
    assert backend.kernels_for(torch.device("meta")) is reference
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")
    assert backend.kernels_for("cpu") is reference
    monkeypatch.setenv("AWQ_EXT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="AWQ_EXT_BACKEND: expected one of compiled, reference, got 'cuda'"):
        backend.kernels_for("cpu")
