"""``torch.ops.awq_ext.int4_linear``: what a quantized layer calls; autograd, torch.compile and export see it.

The schema and the CPU kernel are registered by ``awq_ext._C``; here are the other devices, the shape function and the
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awq_ext import _C, reference  # noqa: F401  (importing _C registers the operator)

__all__ = ["int4_linear"]

OP = "awq_ext::int4_linear"


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    group_size: int,
) -> Tensor:
    """x [..., K] @ W^T + bias, W [N, K] in four bits, K the last dimension of x.

    x fp32/fp16/bf16; qweight uint8 [N, ceil(K / 2)] (see ``reference.pack_int4``); scales [N, G] fp16/bf16/fp32; zeros
    uint8 [N, G]; bias [N] or None; pre_quant_scale fp32 [K], which multiplies x first, or None; group_size -1 or
    positive. Returns [..., N] in x's dtype. On the CPU a few rows are computed in fp32; for many the weight is first
    rounded to x's dtype, as a Linear of that dtype would hold it. Differentiable in x and bias; the weight is frozen.
    ValueError for shapes that do not fit, TypeError for a wrong dtype.
    """
    return torch.ops.awq_ext.int4_linear(x, qweight, scales, zeros, bias, pre_quant_scale, group_size)


def _other_devices(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    group_size: int,
) -> Tensor:
    return reference.int4_linear(x, qweight, scales, zeros, bias, pre_quant_scale, group_size)


def _shape(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, zeros, bias, pre_quant_scale, group_size = inputs
    ctx.save_for_backward(qweight, scales, zeros, pre_quant_scale)
    ctx.in_features, ctx.group_size, ctx.bias_dtype = x.shape[-1], group_size, None if bias is None else bias.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros, pre_quant_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes = reference.unpack_int4(qweight, ctx.in_features)
        weight = reference.dequantize_weight(codes, scales, zeros, ctx.group_size)
        grad_x = grad.float() @ weight
        if pre_quant_scale is not None:
            grad_x = grad_x * pre_quant_scale
        grad_x = grad_x.to(grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


torch.library.impl(OP, "CompositeExplicitAutograd")(_other_devices)
torch.library.register_fake(OP)(_shape)
torch.library.register_autograd(OP, _gradient, setup_context=_keep)
