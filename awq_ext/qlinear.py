"""QuantLinear: the int4 layer that takes the place of nn.Linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import reference
from .backend import kernels_for
from .ops import int4_linear

# These hold bit patterns that were searched for; a cast of the model must not round them again.
_FROZEN_DTYPE = ("scales", "pre_quant_scale")


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def take_hooks(module: nn.Module, old: nn.Module) -> None:
    """Give ``module`` the hooks of ``old``: the very dictionaries, so the handles that users hold still remove them."""
    for name in _HOOKS:
        setattr(module, name, getattr(old, name))
    module._is_full_backward_hook = old._is_full_backward_hook


class QuantLinear(nn.Module):
    """y = (x * pre_quant_scale) @ W^T + bias, W in int4: W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g].

    Buffers: qweight uint8 [N, ceil(K/2)] (even channel in the low nibble), scales fp16 or bf16 [N, G], zeros uint8 [N, G],
    pre_quant_scale fp32 [K] or None (1/s where the scale s could not be folded into an earlier operation).
    Activations fp32, bf16 or fp16 of any leading shape; the output has their dtype. The weight is frozen; gradients reach
    the input and the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = True,
        pre_quant_scale: bool = False,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.dtype = dtype
        groups = reference.group_count(in_features, group_size)
        made = {"device": device}
        self.register_buffer("qweight", torch.zeros(out_features, (in_features + 1) // 2, dtype=torch.uint8, **made))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=scale_dtype, **made))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=torch.uint8, **made))
        self.register_buffer("pre_quant_scale", torch.ones(in_features, **made) if pre_quant_scale else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, **made)) if bias else None

    @classmethod
    def from_packed(
        cls,
        linear: nn.Linear,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        group_size: int,
        pre_quant_scale: Tensor | None = None,
    ) -> QuantLinear:
        """The layer that computes what ``linear`` did, with this qweight uint8 [N, ceil(K/2)], scales and zeros [N, G].

        It shares ``linear``'s bias, and takes over its hooks and training flag.
        """
        layer = cls.empty_like(linear, group_size, False, scales.dtype, device="meta")
        layer.qweight, layer.scales, layer.zeros, layer.pre_quant_scale = qweight, scales, zeros, pre_quant_scale
        layer.bias = linear.bias
        take_hooks(layer, linear)
        return layer.train(linear.training)

    @classmethod
    def empty_like(
        cls,
        linear: nn.Linear,
        group_size: int,
        pre_quant_scale: bool,
        scale_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """A layer of ``linear``'s shape, to be filled."""
        bias = linear.bias is not None
        shape = (linear.in_features, linear.out_features, group_size)
        return cls(*shape, bias, pre_quant_scale, linear.weight.dtype, scale_dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]; called like nn.Linear's argument."""
        return int4_linear(
            input, self.qweight, self.scales, self.zeros, self.bias, self.pre_quant_scale, self.group_size
        )

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for, dequantized: [N, K], detached, in the dtype of the replaced layer."""
        codes = kernels_for(self.qweight.device).unpack_int4(self.qweight, self.in_features)
        weight = reference.dequantize_weight(codes, self.scales, self.zeros, self.group_size)
        if self.pre_quant_scale is not None:
            weight = weight * self.pre_quant_scale
        return weight.to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored: codes, scales, zeros, input scale, bias."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        before = {name: self._buffers[name] for name in _FROZEN_DTYPE}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return self

    def extra_repr(self) -> str:
        run_time = ", pre_quant_scale=True" if self.pre_quant_scale is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits=4, group_size={self.group_size}{run_time}"
        )
