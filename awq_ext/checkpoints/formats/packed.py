"""Carry one quantized Linear between two layouts (PackedLinear), with the checks that every layout shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from ...layers.quantized_weight import QuantizedWeight

SYMMETRIC_ZERO = 8  # the middle code of 4 bits: what formats without zeros subtract


def middle_code(bits: int) -> int:
    """Return the zero of symmetric weights."""
    return 1 << (bits - 1)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written, or does not fit the model; the model is as it was."""


class ShapeError(CheckpointError):
    """A tensor or a layer of a checkpoint has another shape than that of its name in the model."""


@dataclass(frozen=True, eq=False)
class PackedLinear(QuantizedWeight):
    """A weight of 4 or 8 bits (zeros below 2^bits) with the rest of its Linear.

    bias [N]; pre_quant_scale fp32 [K] multiplies the input. rescaled, and compute where the files tell it: see QuantLinear.
    """

    bias: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    rescaled: float = 1.0
    compute: str = "auto"

    @property
    def symmetric(self) -> bool:
        """Tell whether every zero is the middle code."""
        return bool((self.zeros == middle_code(self.bits)).all())


def pack_rows(codes: Tensor) -> Tensor:
    """Pack codes below 16, uint8 [N, K] -> [N, ceil(K/2)], even channel in the low nibble."""
    return kernels.pack_int4(codes)


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """Raise CheckpointError unless the tensor has this shape and one of these dtypes."""
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, this layout needs {tuple(shape)}")
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, this layout needs {known}")


def require_finite(layer: PackedLinear) -> None:
    """Raise CheckpointError where scales hold NaN or Inf: the layer would answer with nothing else, whatever its input."""
    for what, tensor in (("scales", layer.scales), ("pre_quant_scale", layer.pre_quant_scale)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{what} holds NaN or Inf")


def exactly(scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Cast ``scales`` to another dtype; None where a bit would be lost."""
    cast = scales.to(dtype)
    return cast if torch.equal(cast.to(torch.float64), scales.to(torch.float64)) else None


def fitting_bias(packed: PackedLinear, wanted: bool, name: str) -> Tensor | None:
    """Take the bias of the files for a layer that has one in the model; CheckpointError where only one of both has it."""
    # some GPTQ writers give every layer one, of zeros
    there = packed.bias is not None and (wanted or bool(packed.bias.any()))
    if there != wanted:
        raise CheckpointError(f"layer {name!r} has a bias in {'the files' if there else 'the model'} only")
    return packed.bias if there else None
