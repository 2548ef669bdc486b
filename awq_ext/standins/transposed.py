"""Transposed layers: what does a Linear's work with a weight [K, N], as transformers' Conv1D does, and Linears in its place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..modules import asks_gradient, take_hooks


def has_transposed_form(module: nn.Module) -> bool:
    """Tell whether ``module`` holds a weight [K, N], a bias [N] and nothing else, as a transposed layer does."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if {*module._parameters, *module._buffers, *module._modules} != {"weight", "bias"}:
        return False
    return weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[1:]


@torch.no_grad()
def multiplies_transposed(module: nn.Module) -> bool:
    """Find out whether ``module`` returns x @ weight + bias, by trying."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if isinstance(module, nn.Linear) or not has_transposed_form(module):
        return False
    if weight.is_meta or not weight.is_floating_point():
        return False
    return _returns(module, weight.T, bias)


@torch.no_grad()
def computes_linear(module: nn.Linear) -> bool:
    """Find out whether ``module`` does what nn.Linear does: by its class, or by trying if it has a forward of its own."""
    if type(module).forward is nn.Linear.forward:
        return True
    # what it holds beside weight and bias may change what it computes later (adapters start as zeros)
    state = {*module._parameters, *module._buffers, *module._modules}
    weight = module.weight
    if state != {"weight", "bias"} or weight.is_meta or not weight.is_floating_point():
        return False
    return _returns(module, weight, module.bias)


def replaceable_by_linear(module: nn.Module) -> bool:
    """Find out whether a Linear can take the place of ``module``, whose weight may be on the meta device.

    By its class; a Linear with a forward of its own (some routers are such) is tried on random weights.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    trial = copy.copy(module)
    trial._parameters = {
        leaf: value if value is None else nn.Parameter(torch.randn(value.shape), requires_grad=False)
        for leaf, value in module._parameters.items()
    }
    return computes_linear(trial)


def _returns(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Try whether ``module`` returns x @ weight^T + bias for random x."""
    rows, k = 7, weight.shape[1]
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
    # small rows and large ones: a clamp or an activation shows at one end
    x = (x * 2.0 ** torch.arange(-6, 7, 2)[:, None]).to(weight)
    try:
        output = type(module).forward(module, x)
    except Exception:  # whatever it needs, it is something else
        return False
    if not isinstance(output, Tensor) or output.shape != (rows, len(weight)) or output.dtype != weight.dtype:
        return False
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    size = x.float().abs() @ weight.float().abs().T + (0 if bias is None else bias.float().abs())
    # k products added up in fp32 here and there, and two roundings to the dtype (before and after the bias)
    allowed = (2 * k * torch.finfo(torch.float32).eps + 2 * torch.finfo(weight.dtype).eps) * size
    return bool(((output.float() - expected).abs() <= allowed).all())


def linear_of(module: nn.Module) -> nn.Linear:
    """Make a Linear that computes the same. Its weight [N, K] is a view; bias, hooks and training flag are the module's own."""
    weight = module.weight
    linear = nn.Linear(*weight.shape, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=asks_gradient(weight))
    linear.bias = module.bias
    take_hooks(linear, module)
    return linear.train(module.training)


def with_weight_of(module: nn.Module, linear: nn.Linear) -> nn.Module:
    """Make a layer like ``module`` that computes what ``linear`` does."""
    layer = copy.copy(module)
    weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    layer._parameters = module._parameters | {"weight": weight, "bias": linear.bias}
    return layer.train(linear.training)
