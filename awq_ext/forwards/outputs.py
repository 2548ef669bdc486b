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
    """Return the Frobenius norm of all tensors together, summed in fp64."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def distance_of(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the Frobenius distance of all tensors together; inf where shapes differ or values are not finite."""
    if [tensor.shape for tensor in tensors] != [other.shape for other in others]:
        return float("inf")
    total = norm_of([tensor.double() - other.double() for tensor, other in zip(tensors, others, strict=True)])
    return total if total == total else float("inf")
