"""Sizes of weight groups, and conversions between groups and channels."""

from __future__ import annotations

import torch
from torch import Tensor


def group_length(in_features: int, group_size: int) -> int:
    """Count the channels in a full group: ``group_size``, or the whole row for -1 or a row shorter than a group."""
    return in_features if group_size == -1 else min(group_size, in_features)


def group_count(in_features: int, group_size: int) -> int:
    """Count the groups in a row, the short last one included."""
    return -(-in_features // group_length(in_features, group_size))


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Give every channel its group's value: [..., G] -> [..., K]."""
    return values.repeat_interleave(group_length(in_features, group_size), dim=-1)[..., :in_features]


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """Split rows into groups: [N, K] -> [N, G, g], a short last one padded with zeros (which widen no range that includes 0)."""
    g = group_length(weight.shape[1], group_size)
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % g)).view(weight.shape[0], -1, g)
