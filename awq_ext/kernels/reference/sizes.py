"""Sizes of weight groups, and what is done to each of their channels."""

from __future__ import annotations

import torch
from torch import Tensor


def group_length(in_features: int, group_size: int) -> int:
    """Channels in a full group: ``group_size``, or the whole row for -1 or a row shorter than a group."""
    return in_features if group_size == -1 else min(group_size, in_features)


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row, the short last one included."""
    return -(-in_features // group_length(in_features, group_size))


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """[..., G] -> [..., K]: every channel gets its group's value."""
    return values.repeat_interleave(group_length(in_features, group_size), dim=-1)[..., :in_features]


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g], a short last group filled with zeros (a zero never widens a range that includes 0)."""
    g = group_length(weight.shape[1], group_size)
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % g)).view(weight.shape[0], -1, g)
