"""QuantLinear as a module: what it computes, and that casting, copying and storing it keeps every bit that was searched for."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same_bits
from torch import Tensor, nn

import awq_ext
from awq_ext import _C, QuantLinear
from awq_ext.kernels import reference

BUFFERS = ("qweight", "scales", "zeros", "pre_quant_scale")


def layer(
    k: int = 72,
    n: int = 9,
    group: int = 16,
    bias: bool = True,
    scaled: bool = True,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    bits: int = 4,
) -> QuantLinear:
    """A filled layer."""
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    made = QuantLinear.empty_like(linear, group, scaled, scale_dtype, bits=bits)
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k), group, bits, scale_dtype=scale_dtype)
    made.qweight, made.scales, made.zeros = _C.pack_int4(codes) if bits == 4 else codes, scales, zeros
    if scaled:
        made.pre_quant_scale = torch.rand(k) + 0.5
    made.bias = linear.bias
    return made


def exact_weight(module: QuantLinear) -> Tensor:
    """fp64 [N, K] from the buffers alone, one entry at a time."""
    out = torch.empty(module.out_features, module.in_features, dtype=torch.float64)
    g = module.in_features if module.group_size == -1 else module.group_size
    qweight, scales, zeros = module.qweight, module.scales, module.zeros
    for n in range(module.out_features):
        for k in range(module.in_features):
            code = int(qweight[n, k]) if module.bits == 8 else int(qweight[n, k // 2]) >> 4 * (k % 2) & 15
            out[n, k] = (code - int(zeros[n, k // g])) * float(scales[n, k // g])
    return out if module.pre_quant_scale is None else out * module.pre_quant_scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("k", "group"), [(72, 16), (13, -1), (70, 64)])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (40,), ()])
@pytest.mark.parametrize("bits", [4, 8])
def test_forward_is_a_linear_of_the_dequantized_weight(
    k: int, group: int, scaled: bool, dtype: torch.dtype, shape: tuple[int, ...], bits: int
) -> None:
    module = layer(k, 7, group, scaled=scaled, dtype=dtype, bits=bits)
    x = torch.randn(*shape, k).to(dtype)
    with torch.no_grad():
        found = module(x)
    weight, bias = exact_weight(module), module.bias.detach().double()
    expected = x.double() @ weight.T + bias
    assert found.shape == (*shape, 7)
    assert found.dtype == dtype
    # fp32: a sum of K + 1 terms, each of at most 3 factors, (K + 4) 2^-24; 16 bits: also the weight, x / s and the result
    # may be rounded to x's dtype, half an eps each
    unit = 0.0 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
    bound = (x.double().abs() @ weight.abs().T + bias.abs()) * (unit + (k + 4) * 2.0**-24) * 1.01
    assert torch.all((found.double() - expected).abs() <= bound)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double", "to"])
@pytest.mark.parametrize("bits", [4, 8])
def test_casts_keep_what_was_searched(cast: str, scale_dtype: torch.dtype, bits: int) -> None:
    module = layer(scale_dtype=scale_dtype, bits=bits)
    before = {name: getattr(module, name).clone() for name in BUFFERS}
    changed = module.to(torch.bfloat16) if cast == "to" else getattr(module, cast)()
    assert changed is module
    for name, old in before.items():
        assert same_bits(getattr(module, name), old), name
    assert module.bias.dtype == module.weight.dtype != torch.float32 or cast == "float"


@pytest.mark.parametrize("bias", [False, True])
def test_the_weights_dtype_follows_a_cast(bias: bool) -> None:
    """Code that reads ``layer.weight.dtype`` to choose its own must see what a Linear would say."""
    holder = nn.Sequential(layer(bias=bias))
    assert holder[0].weight.dtype == torch.float32
    assert holder.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16
    assert holder.to("cpu")[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_to_another_device_moves_everything(bits: int) -> None:
    module = layer(bits=bits).to("meta")
    assert all(t.is_meta for t in (*module.buffers(), *module.parameters()))
    assert module.scales.dtype == torch.float16
    assert module(torch.empty(3, 72, device="meta")).shape == (3, 9)


def test_rows_that_do_not_fit() -> None:
    module = layer()
    with pytest.raises(ValueError, match=r"qweight has shape \(9, 35\), this layer needs \(9, 36\)"):
        module.qweight = torch.zeros(9, 35, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zeros must be below 16, got 16"):
        module.zeros = torch.full((9, 5), 16, dtype=torch.uint8)
    wide = layer(bits=8)
    with pytest.raises(ValueError, match=r"qweight has shape \(9, 36\), this layer needs \(9, 72\)"):
        wide.qweight = module.qweight
    wide.zeros = torch.full((9, 5), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zeros must be below 256, got 256"):
        wide.zeros = torch.full((9, 5), 256)
    with pytest.raises(RuntimeError, match=r"qweight has shape \(9, 36\), this layer needs \(9, 72\)"):
        wide.load_state_dict(module.state_dict())
    state = module.state_dict() | {"scales": torch.zeros(9, 6)}
    with pytest.raises(RuntimeError, match=r"scales has shape \(9, 6\), this layer needs \(9, 5\)"):
        layer().load_state_dict(state)
    incomplete = {name: value for name, value in module.state_dict().items() if name != "zeros"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "zeros"'):
        layer().load_state_dict(incomplete)
    assert layer().load_state_dict(incomplete, strict=False).missing_keys == ["zeros"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        layer().load_state_dict(module.state_dict() | {"more": torch.zeros(1)})


def test_other_widths_do_not_exist() -> None:
    with pytest.raises(ValueError, match="bits=3: a QuantLinear has 4 or 8 bits"):
        QuantLinear(8, 8, 8, bits=3)


def test_shared_memory_is_shared_and_equal() -> None:
    module, x = layer(), torch.randn(3, 72)
    before = module(x)
    assert all(t.is_shared() for t in (*module.share_memory().buffers(), *module.parameters()))
    assert torch.equal(module(x), before)


def test_weights_in_large_pages_are_ordinary_tensors() -> None:
    """From two megabytes on the tiles lie in memory that torch did not allocate."""
    module, x = layer(k=4096, n=1056, group=128), torch.randn(3, 4096)
    assert module.tiles.nbytes >= 2 << 20
    assert module.tiles.data_ptr() % (2 << 20) == 0
    assert_equal(module, copy.deepcopy(module))
    assert_equal(module, pickle.loads(pickle.dumps(module)))
    before = module(x)
    assert all(t.is_shared() for t in module.share_memory().buffers())
    assert torch.equal(module(x), before)
    kept = module.tiles[1:]
    del module
    gc.collect()
    assert kept.sum() > 0


def assert_equal(a: QuantLinear, b: QuantLinear) -> None:
    assert type(a) is type(b)
    assert a.extra_repr() == b.extra_repr()
    assert (a.training, a.dtype) == (b.training, b.dtype)
    for name in (*BUFFERS, "bias"):
        assert same_bits(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name) is not getattr(b, name)
    x = torch.randn(3, a.in_features)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def save_and_load(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
    ids=["deepcopy", "pickle", "torch"],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_are_equal_and_apart(copied: Any, bits: int) -> None:
    module = layer(bits=bits).eval()
    assert_equal(module, copied(module))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_state_dict_round_trip(assign: bool, bits: int) -> None:
    module = layer(bits=bits)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert set(state) == {*BUFFERS, "bias"}
    fresh = QuantLinear(72, 9, 16, pre_quant_scale=True, bits=bits)
    assert fresh.load_state_dict(state, assign=assign).missing_keys == []
    assert_equal(module, fresh)
    assert set(layer(bias=False, scaled=False).state_dict()) == {"qweight", "scales", "zeros"}


def test_what_it_says_about_itself() -> None:
    assert repr(layer()) == (
        "QuantLinear(in_features=72, out_features=9, bias=True, bits=4, group_size=16, pre_quant_scale=True)"
    )
    assert "pre_quant_scale" not in repr(layer(scaled=False))
    assert "bits=8" in repr(layer(bits=8))
    # a tile of 18 steps of 64 bytes, 5 groups of 32 two-byte scales and half-byte zeros; 9 bias, 72 input scales of 4
    assert layer().nbytes == 18 * 64 + 5 * 32 * 2 + 5 * 16 + 4 * 9 + 4 * 72
    assert layer(k=13, group=-1, bias=False, scaled=False).nbytes == 4 * 64 + 32 * 2 + 16
    assert layer(k=13, group=-1, bias=False, scaled=False, bits=8).nbytes == 4 * 128 + 32 * 2 + 32


def stored(module: QuantLinear, directory: Path) -> QuantLinear:
    awq_ext.save(nn.Sequential(module), directory, overwrite=True)
    return awq_ext.load(nn.Sequential(nn.Linear(72, 9)), directory)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_compute_dtype_stays_with_the_layer(tmp_path: Path, bits: int) -> None:
    module = layer(bits=bits)
    assert module.compute == "auto"
    assert awq_ext.set_compute_dtype(nn.Sequential(module, nn.ReLU()), "int8")[0] is module
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        save_and_load(module),
        stored(module, tmp_path),
    ]
    assert "compute='int8'" in repr(module)
    for other in copies:
        assert other.compute == "int8"
        assert_equal(module, other)
    assert module.half().to("cpu").compute == "int8"
    module.compute = "auto"
    assert "compute" not in repr(module)
    assert stored(module, tmp_path).compute == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_compute_dtype_changes_what_is_computed_a_little(dtype: torch.dtype, bits: int) -> None:
    module, x = layer(dtype=dtype, bits=bits), torch.randn(30, 72).to(dtype)
    with torch.no_grad():
        before = module(x).double()
        module.compute = "int8"
        found = module(x).double()
    # each x is off by at most half a step, a 127th of the largest in its group, here of the row
    scaled = (x.double() * module.pre_quant_scale).abs()
    bound = scaled.amax(-1, keepdim=True) / 127 / 2 * (exact_weight(module) / module.pre_quant_scale).abs().sum(1)
    assert (found - before).abs().max() > 0
    assert torch.all(
        (found - before).abs() <= bound + (before.abs() + scaled.sum(-1, keepdim=True)) * torch.finfo(dtype).eps
    )


def test_compute_dtypes_that_do_not_exist(tmp_path: Path) -> None:
    module = layer()
    with pytest.raises(ValueError, match="compute_dtype: expected one of auto, int8, got 'int4'"):
        module.compute = "int4"
    with pytest.raises(ValueError, match="compute_dtype: expected one of auto, int8, got 'bf16'"):
        awq_ext.set_compute_dtype(module, "bf16")
    with pytest.raises(ValueError, match="Linear holds no QuantLinear"):
        awq_ext.set_compute_dtype(nn.Linear(2, 2), "int8")
    assert module.compute == "auto"
    awq_ext.save(nn.Sequential(module), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"auto"', '"int3"'))
    with pytest.raises(awq_ext.CheckpointError, match=r"in_memory\.layers\['0'\] is \['float32', 'int3'\]"):
        awq_ext.load(nn.Sequential(nn.Linear(72, 9)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_property(scaled: bool, dtype: torch.dtype, bits: int) -> None:
    module = layer(scaled=scaled, dtype=dtype, bits=bits)
    weight = module.weight
    assert not weight.requires_grad
    assert weight.dtype == dtype
    # two fp32 products, one rounding to the dtype
    exact = exact_weight(module)
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert torch.all((weight.double() - exact).abs() <= exact.abs() * (2.0**-23 + unit * 1.01))


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_reach_input_and_bias(bits: int) -> None:
    module = layer(bits=bits)
    x = torch.randn(4, 72, requires_grad=True)
    module(x).sum().backward()
    # nine products a component in fp32, two more for scale and input scale
    exact = exact_weight(module)
    assert torch.all((x.grad.double() - exact.sum(0)).abs() <= exact.abs().sum(0) * 12 * 2.0**-24)
    assert torch.equal(module.bias.grad, torch.full((9,), 4.0))


def quantized(linear: nn.Linear) -> nn.Sequential:
    model = nn.Sequential(linear, nn.ReLU())
    return awq_ext.quantize(model, [torch.randn(8, linear.in_features)], group_size=16, progress=False)


def test_hooks_of_the_linear_stay() -> None:
    linear, seen = nn.Linear(32, 4), []
    handles = [
        linear.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        linear.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre kwargs"), with_kwargs=True),
        linear.register_forward_hook(lambda m, args, out: seen.append("post")),
        linear.register_forward_hook(lambda m, args, kwargs, out: seen.append("post kwargs"), with_kwargs=True),
    ]
    model = quantized(linear)
    assert isinstance(model[0], QuantLinear)
    seen.clear()
    model(torch.randn(2, 32))
    assert seen == ["pre", "pre kwargs", "post", "post kwargs"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(2, 32))
    assert seen == []


def test_backward_hooks_of_the_linear_stay() -> None:
    linear, seen = nn.Linear(32, 4), []
    linear.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(tuple(grad_out[0].shape)))
    model = quantized(linear)
    model(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert seen == [(2, 4)]


def test_it_keeps_a_linears_attributes() -> None:
    linear = nn.Linear(32, 4)
    bias = linear.bias
    module = quantized(linear)[0]
    assert (module.in_features, module.out_features, module.bias) == (32, 4, bias)
    assert module.bias is bias
    assert module.bias.requires_grad
    assert module.weight.shape == (4, 32)


def test_the_input_may_be_passed_by_its_name() -> None:
    """nn.Linear calls its argument ``input``."""
    module = layer()
    x = torch.randn(3, 72)
    with torch.no_grad():
        assert torch.equal(module(input=x), module(x))


def test_empty_rows() -> None:
    assert layer()(torch.empty(0, 72)).shape == (0, 9)
    assert layer()(torch.empty(2, 0, 72)).shape == (2, 0, 9)


def test_group_counts() -> None:
    assert layer(k=70, group=64).scales.shape == (9, 2) == (9, reference.group_count(70, 64))
    assert layer(k=13, group=-1).zeros.shape == (9, 1)
