"""The operators of ``torch.ops.awq_ext`` that a quantized layer calls: autograd, autocast, torch.compile and export see them.

``awq_ext._C`` registers the schemas, the CPU kernels, the usual Linear on a GPU, the gradient and the autocast rules; this file
registers all else of a GPU, the kernels of other devices, the shape functions, and what torch.func.vmap does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (importing _C registers the operators)
from ..kernels import kernels_for, reference

__all__ = ["quant_linear", "quant_scale_gradient", "quant_weight"]


def quant_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    compute_dtype: str = "auto",
) -> Tensor:
    """Compute x [..., K] @ W^T + bias, W [N, K] in 4 or 8 bits.

    x fp32/fp16/bf16; tiles uint8 [T, S, 16 bits], scales [T, G, 32] fp16/bf16 and zeros uint8 [T, G, 4 bits] in the compute
    layout (``reference.tile_codes``, ``tile_scales``, ``tile_zeros``); bias [N] or None; pre_quant_scale fp32 [K], which
    multiplies x first, or None; group_size -1 or positive; bits 4 or 8. Returns [..., N] in x's dtype. Sums are fp32 on the CPU.
    The weight is never rounded; x is rounded only if it is bf16, when its product with pre_quant_scale becomes bf16 again. Under
    autocast x is cast as a Linear's input is. Differentiable in x, bias and scales, codes are frozen; the gradient of the scales
    has their shape and 16-bit dtype (:func:`quant_scale_gradient` returns it in fp32). Under torch.func and in forward mode x and
    bias have all derivatives, by torch's own products with the dequantized weight; scales have none there.
    compute_dtype "int8" rounds the activations to eight bits on the fly (``reference.int8_activations``) and computes with
    integers: faster with many rows, less accurate. Gradients are those of "auto".
    ValueError for shapes that do not fit, other bits or an unknown compute_dtype, TypeError for a wrong dtype.
    """
    return torch.ops.awq_ext.quant_linear.default(
        x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits, compute_dtype
    )


def quant_weight(
    tiles: Tensor, scales: Tensor, zeros: Tensor, in_features: int, out_features: int, group_size: int, bits: int
) -> Tensor:
    """Dequantize the weight that quant_linear multiplies by (without pre_quant_scale): fp32 [N, K]."""
    return torch.ops.awq_ext.quant_weight.default(tiles, scales, zeros, in_features, out_features, group_size, bits)


def quant_scale_gradient(
    gradient: Tensor,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Compute the gradient of a loss with respect to the scales of quant_linear's weight: fp32 [N, G], rows as in a state_dict.

    gradient [..., N]: the loss's with respect to quant_linear's output for x [..., K], in the same dtype; all else as
    :func:`quant_linear` takes it. The gradient of the weight [N, K] is never held. Sums are fp32 on the CPU.
    """
    return torch.ops.awq_ext.quant_scale_gradient.default(
        gradient, x, tiles, scales, zeros, pre_quant_scale, in_features, out_features, group_size, bits
    )


def _linear_shape(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    compute_dtype: str = "auto",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _weight_shape(
    tiles: Tensor, scales: Tensor, zeros: Tensor, in_features: int, out_features: int, group_size: int, bits: int
) -> Tensor:
    return scales.new_empty((out_features, in_features), dtype=torch.float32)


def _scale_shape(
    gradient: Tensor,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    return scales.new_empty((out_features, scales.shape[1]), dtype=torch.float32)


def _linears(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
    """Compute quant_linear under torch.func.vmap: one call for many x, else one for each place of the batch."""
    op = torch.ops.awq_ext.quant_linear.default
    if set(in_dims[1:]) == {None}:
        return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    places = range(info.batch_size)
    at = lambda i: [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]  # noqa: E731
    return torch.stack([op(*at(i)) for i in places]), 0


def _on_gpu(name: str) -> Callable[..., Tensor]:
    """Make the operator's function for CUDA tensors: our kernels where they were built, else the reference."""

    def run(*args: Any) -> Tensor:
        return getattr(kernels_for(args[0].device), name)(*args)

    return run


for _name, _function, _shape in (
    ("quant_linear", reference.quant_linear, _linear_shape),
    ("quant_weight", reference.quant_weight, _weight_shape),
    ("quant_scale_gradient", reference.quant_scale_gradient, _scale_shape),
):
    torch.library.impl(f"awq_ext::{_name}", "CompositeExplicitAutograd")(_function)
    torch.library.register_fake(f"awq_ext::{_name}")(_shape)
torch.library.register_vmap("awq_ext::quant_linear", _linears)
torch.library.impl("awq_ext::quant_linear_by_python", "CUDA")(_on_gpu("quant_linear"))
torch.library.impl("awq_ext::quant_weight", "CUDA")(_on_gpu("quant_weight"))
