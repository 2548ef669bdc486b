"""quant_linear under torch.func and forward-mode differentiation: derivatives are those of a Linear of the same weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from awq_ext.layers.ops import quant_linear
from awq_ext.layers.quant_linear import QuantLinear

K, N = 40, 24
# torch loads its own forward-mode formulas by a deprecated function, and linearize keeps tensors that it has no name for
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def quantized(pre_quant_scale: bool) -> tuple[QuantLinear, nn.Linear]:
    """A layer, and the Linear of its weight."""
    torch.manual_seed(0)
    layer = QuantLinear(K, N, 16, bias=True, pre_quant_scale=pre_quant_scale)
    layer.qweight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    layer.scales, layer.zeros = torch.rand(N, 3).half() / 10, torch.randint(0, 16, (N, 3), dtype=torch.uint8)
    if pre_quant_scale:
        layer.pre_quant_scale.uniform_(0.5, 2.0)
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        linear.bias.copy_(layer.bias.normal_())
    return layer, linear


def forward_mode(layer: nn.Module, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent


def of_the_bias(layer: nn.Module, x: Tensor, tangent: Tensor) -> Tensor:
    return func.jvp(lambda b: func.functional_call(layer, {"bias": b}, (x,)), (layer.bias,), (tangent[0, :N],))[1]


def per_sample(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    loss = lambda b, row: func.functional_call(layer, {"bias": b}, (row,)).square().sum()  # noqa: E731
    return func.vmap(func.grad(loss), in_dims=(None, 0))(layer.bias.detach(), x)


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "jvp": lambda layer, x, tangent: func.jvp(layer, (x,), (tangent,))[1],
    "forward mode": forward_mode,
    "jvp of the bias": of_the_bias,
    "linearize": lambda layer, x, tangent: func.linearize(layer, x)[1](tangent),
    "vjp": lambda layer, x, _: func.vjp(layer, x)[1](x[:, :N])[0],
    "gradients of samples": per_sample,
    "jacrev": lambda layer, x, _: func.jacrev(layer)(x[0]),
    "jacfwd": lambda layer, x, _: func.jacfwd(layer)(x[0]),
    "hessian": lambda layer, x, _: func.hessian(lambda row: layer(row).square().sum())(x[0]),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["bias trained", "frozen"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "divided at run time"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_a_linear(name: str, scaled: bool, frozen: bool) -> None:
    layer, linear = quantized(scaled)
    for one in (layer, linear):
        one.requires_grad_(not frozen)
    x, tangent = torch.randn(2, 3, K)
    found, expected = (DERIVATIVES[name](one, x, tangent).detach() for one in (layer, linear))
    # sums of 40 products, or of 24 of them, in fp32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_those_of_the_kernel(dtype: torch.dtype) -> None:
    layer, x = quantized(True)[0].to(dtype), torch.randn(3, K, dtype=dtype)
    value, tangent = (one.detach() for one in func.jvp(layer, (x,), (x,)))
    assert value.dtype == tangent.dtype == dtype
    # x is rounded once more by the kernel, and the output by both
    torch.testing.assert_close(value, layer(x), rtol=0.0, atol=4 * torch.finfo(dtype).eps * float(value.abs().max()))


def test_scales_have_no_such_derivative() -> None:
    layer, x = quantized(False)[0], torch.randn(3, K)

    def of_scales(scales: Tensor) -> Tensor:
        return quant_linear(x, layer.tiles, scales, layer.tile_zeros, None, None, K, N, 16, 4)

    scales = layer.tile_scales
    with pytest.raises(RuntimeError, match=r"C\+\+"):
        func.jvp(of_scales, (scales,), (scales,))
    with pytest.raises(RuntimeError, match=r"C\+\+"):
        func.grad(lambda one: of_scales(one).sum())(scales)


class Calls(TorchDispatchMode):
    """Counts the calls of quant_linear."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.awq_ext.quant_linear.default
        return function(*args, **(kwargs or {}))


def test_vmap_gives_what_a_loop_gives() -> None:
    """Over inputs along any dimension by one call, and over layers with their inputs."""
    layers = [quantized(True)[0] for _ in range(2)]
    layers[1].qweight = layers[0].qweight ^ 255
    x = torch.randn(5, 2, K)
    with torch.no_grad():
        with Calls() as calls:
            found = func.vmap(layers[0], in_dims=1, out_dims=1)(x), func.vmap(func.vmap(layers[0]))(x)
        assert calls.count == 2
        assert all(torch.equal(one, layers[0](x)) for one in found)
        stacked = func.stack_module_state(layers)
        call = lambda state, buffers, rows: func.functional_call(layers[0], (state, buffers), (rows,))  # noqa: E731
        found = func.vmap(call, in_dims=(0, 0, 1))(*stacked, x)
    assert torch.equal(found, torch.stack([layer(x[:, i]) for i, layer in enumerate(layers)]))
    assert not torch.equal(found[0], found[1])
