"""QuantLinear: the layer of 4 or 8 bits that takes the place of nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..modules import take_hooks
from .frozen import FrozenTensor
from .ops import quant_linear, quant_weight
from .quantized_weight import QuantizedWeight, row_bytes

# These hold values that a search has chosen; a cast of the model must not round them again.
_FROZEN_DTYPE = ("tile_scales", "pre_quant_scale")
# Checkpoint tensor -> the buffer that holds it in the compute layout.
TILED = {"qweight": "tiles", "scales": "tile_scales", "zeros": "tile_zeros"}
COMPUTE_DTYPES = ("auto", "int8")


def _known_compute_dtype(value: str) -> str:
    if value not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype: expected one of {', '.join(COMPUTE_DTYPES)}, got {value!r}")
    return value


class QuantLinear(nn.Module):
    """The Linear y = (x * pre_quant_scale) @ W^T + bias with weights of 4 or 8 bits.

    W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]. The weight is held once, in the layout that the kernels read
    (csrc/base/layout.h): tiles uint8 [T, S, 16 bits], tile_scales fp16 or bf16 [T, G, 32], tile_zeros uint8 [T, G, 4 bits].
    ``state_dict`` and checkpoints have rows instead, converted exactly on the way in and out: qweight uint8, for 4 bits
    [N, ceil(K/2)] (even channel in the low nibble), for 8 bits [N, K]; scales [N, G], zeros uint8 [N, G]. The attributes of these
    names return a copy, and can be assigned. pre_quant_scale is fp32 [K] or None: 1/s, where the scale s could not be folded into
    an earlier operation.
    Activations fp32, bf16 or fp16 of any leading shape; the output has their dtype. The weight is frozen; gradients reach
    the input and the bias. ``compute`` says what the products are computed in (:func:`set_compute_dtype`).
    ``rescaled`` is 1 for nearly all models. In the others (RWKV) the model's own first forward multiplies the weight in place by a
    power of two: this one, which the quantized weight holds already. When a loaded model does that again, nothing changes.
    """

    rescaled = 1.0
    _compute = "auto"
    bits = 4  # of modules that were pickled before there were others

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
        bits: int = 4,
    ) -> None:
        if bits not in reference.TILE_BITS:
            raise ValueError(f"bits={bits!r}: a QuantLinear has {' or '.join(map(str, reference.TILE_BITS))} bits")
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.bits = bits
        self.dtype = dtype
        groups = reference.group_count(in_features, group_size)
        count, steps = -(-out_features // reference.TILE_OUTPUTS), reference.step_count(in_features, group_size)
        made = {"device": device}
        # not persistent: state_dict gets rows, not tiles
        self.register_buffer("tiles", torch.zeros(count, steps, 16 * bits, dtype=torch.uint8, **made), False)
        self.register_buffer("tile_scales", torch.zeros(count, groups, 32, dtype=scale_dtype, **made), False)
        self.register_buffer("tile_zeros", torch.zeros(count, groups, 4 * bits, dtype=torch.uint8, **made), False)
        self.register_buffer("pre_quant_scale", torch.ones(in_features, **made) if pre_quant_scale else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, **made)) if bias else None

    @classmethod
    def from_packed(
        cls,
        linear: nn.Linear,
        weight: QuantizedWeight,
        pre_quant_scale: Tensor | None = None,
    ) -> QuantLinear:
        """Build the layer that computes what ``linear`` did, with this weight of 4 or 8 bits; pre_quant_scale: fp32 [K] or None.

        It shares ``linear``'s bias, and takes over its hooks and training flag.
        """
        layer = cls.empty_like(linear, weight.group_size, False, weight.scales.dtype, "meta", weight.bits)
        layer.qweight, layer.scales, layer.zeros = weight.qweight, weight.scales, weight.zeros
        layer.pre_quant_scale = pre_quant_scale
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
        bits: int = 4,
    ) -> QuantLinear:
        """Make a layer of ``linear``'s shape, to be filled."""
        bias = linear.bias is not None
        shape = (linear.in_features, linear.out_features, group_size)
        return cls(*shape, bias, pre_quant_scale, linear.weight.dtype, scale_dtype, device, bits)

    def forward(self, input: Tensor) -> Tensor:
        """Map input [..., K] to [..., N]; the argument is named as nn.Linear's is."""
        return quant_linear(
            input,
            self.tiles,
            self.tile_scales,
            self.tile_zeros,
            self.bias,
            self.pre_quant_scale,
            self.in_features,
            self.out_features,
            self.group_size,
            self.bits,
            self._compute,
        )

    @property
    def compute(self) -> str:
        """What the products are computed in, "auto" or "int8": see :func:`set_compute_dtype`. Can be assigned."""
        # Not named compute_dtype: PEFT would take that for a torch.dtype.
        return self._compute

    @compute.setter
    def compute(self, value: str) -> None:
        self._compute = _known_compute_dtype(value)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for: [N, K], detached, in the dtype of the replaced layer.

        It is dequantized on every access, so a write to it would be lost, and raises RuntimeError.
        """
        sizes = (self.in_features, self.out_features, self.group_size, self.bits)
        weight = quant_weight(self.tiles, self.tile_scales, self.tile_zeros, *sizes)
        if self.pre_quant_scale is not None:
            weight = weight * self.pre_quant_scale
        frozen = weight.to(self.dtype).as_subclass(FrozenTensor)
        if self.rescaled != 1:
            frozen.rescaled = self.rescaled
        return frozen

    def to_tiles(self, name: str, rows: Tensor) -> Tensor:
        """Convert qweight, scales or zeros to the buffer ``TILED[name]``. ValueError if the shape or a zero does not fit."""
        sizes = {"qweight": row_bytes(self.in_features, self.bits)}
        expected = (self.out_features, sizes.get(name, reference.group_count(self.in_features, self.group_size)))
        if rows.shape != expected:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, this layer needs {expected}")
        if name == "qweight":
            return kernels.tile_codes(rows, self.in_features, self.group_size, self.bits)
        if name == "scales":
            return reference.tile_scales(rows)
        if not rows.is_meta and rows.numel() and (largest := int(rows.max())) >= 1 << self.bits:
            raise ValueError(f"zeros must be below {1 << self.bits}, got {largest}")
        return reference.tile_zeros(rows, self.bits)

    def to_rows(self, name: str) -> Tensor:
        """Return a copy of qweight, scales or zeros as a checkpoint has them."""
        held = getattr(self, TILED[name])
        if name == "qweight":
            return kernels.untile_codes(held, self.out_features, self.in_features, self.group_size, self.bits)
        if name == "scales":
            return reference.untile_scales(held, self.out_features)
        return reference.untile_zeros(held, self.out_features, self.bits)

    @property
    def qweight(self) -> Tensor:
        """Codes, uint8: packed [N, ceil(K/2)] for 4 bits, [N, K] for 8."""
        return self.to_rows("qweight")

    @qweight.setter
    def qweight(self, rows: Tensor) -> None:
        self.tiles = self.to_tiles("qweight", rows)

    @property
    def scales(self) -> Tensor:
        """Scales of the weight groups, fp16 or bf16 [N, G]."""
        return self.to_rows("scales")

    @scales.setter
    def scales(self, rows: Tensor) -> None:
        self.tile_scales = self.to_tiles("scales", rows)

    @property
    def zeros(self) -> Tensor:
        """Zeros of the weight groups, uint8 [N, G]."""
        return self.to_rows("zeros")

    @zeros.setter
    def zeros(self, rows: Tensor) -> None:
        self.tile_zeros = self.to_tiles("zeros", rows)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in TILED:
            destination[prefix + name] = self.to_rows(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, buffer in TILED.items():
            rows = state_dict.get(prefix + name)
            if rows is None:
                missing_keys.extend([prefix + name] if strict else [])
                continue
            try:
                tiles = self.to_tiles(name, rows)
            except ValueError as error:
                error_msgs.append(f"{prefix + name}: {error}")
                continue
            if assign:
                setattr(self, buffer, tiles)
            else:
                with torch.no_grad():
                    getattr(self, buffer).copy_(tiles)
        rest = {name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in TILED}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: tiles, input scale, bias."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        before = {name: self._buffers[name] for name in _FROZEN_DTYPE}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.tiles.device)).dtype
        return self

    def extra_repr(self) -> str:
        run_time = ", pre_quant_scale=True" if self.pre_quant_scale is not None else ""
        if self.compute != "auto":
            run_time += f", compute={self.compute!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}{run_time}"
        )


def set_compute_dtype(model: nn.Module, compute_dtype: str) -> nn.Module:
    """Choose what all quantized layers of ``model`` compute in; return the model.

    "auto", the default: products are summed in fp32; activations are not rounded, except that bf16 ones stay bf16 after the input
    scale. "int8": each row of activations is rounded to eight bits on the fly, with a scale for each weight group (at most 256
    channels), and multiplied as integers. That is faster with many rows (prefill, batches, encoders) and costs accuracy:
    docs/speed.md has both measured. The choice is saved and loaded with the model; for a single layer assign ``compute``.
    ValueError, before anything changes, for another value or a model without such layers.
    """
    _known_compute_dtype(compute_dtype)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no QuantLinear: quantize it first")
    for layer in layers:
        layer.compute = compute_dtype
    return model
