"""Outputs of a model or a block: the logits among them, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .calls import Call

IGNORED_LABEL = -100  # what torch's cross entropy and Transformers use


def logits_of(output: Any) -> Tensor | None:
    """Find the logits in what a model returned: itself, ``.logits``, ``["logits"]`` or the first of a tuple; None without any."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.dim() >= 2 and output.is_floating_point() else None


def targets_of(call: Call) -> Tensor | None:
    """Find the tokens to be predicted, [B, T]: ``labels``, else the ids that the model was called with; None without any."""
    named = [call.kwargs.get(name) for name in ("labels", "decoder_input_ids", "input_ids")]
    for value in (*named, *call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            return value.long()
    return None


def float_tensors(output: Any) -> list[Tensor]:
    """List the floating-point tensors in what a model or a block returned."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Return the Frobenius norm of all tensors together, summed in fp64; entries of -inf and inf do not count (masks have them)."""
    total = _squares(tensors)
    if total == float("inf"):
        total = _squares([torch.where(tensor.isinf(), 0, tensor) for tensor in tensors])
    return total**0.5


def distance_of(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the Frobenius distance of all tensors together; inf where shapes differ, or values that are not finite."""
    if [tensor.shape for tensor in tensors] != [other.shape for other in others]:
        return float("inf")
    pairs = [(one.double(), other.double()) for one, other in zip(tensors, others, strict=True)]
    total = _squares([one - other for one, other in pairs])
    if total != total:  # -inf less -inf is NaN
        total = _squares([torch.where(one == other, 0, one - other) for one, other in pairs])
    return total**0.5 if total == total else float("inf")


def error_of(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return :func:`distance_of`, relative to the norm of those of ``others`` that differ.

    What a block only passes on, such as a mask of large negative numbers, would hide the errors of the rest.
    """
    if (distance := distance_of(tensors, others)) in (0.0, float("inf")):
        return distance
    differing = [other for one, other in zip(tensors, others, strict=True) if not equal(one, other)]
    return distance / (norm_of(differing) or 1.0)


def _squares(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and values."""
    return one.dtype == other.dtype and torch.equal(one, other)
