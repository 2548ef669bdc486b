"""Two layers of experts in lists, and what a survey finds in models whose children are blocks."""

from __future__ import annotations

import architectures
import torch
from architectures import ExpertList
from torch import nn

from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block
from awq_ext.survey.mixtures import find_mixtures
from awq_ext.survey.survey import BlockSurvey, survey


def two_layers(count: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return architectures.loud(nn.Sequential(ExpertList(count), ExpertList(count))).to(dtype)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def surveyed(model: nn.Module, calls: list[Call]) -> list[BlockSurvey]:
    blocks = [Block(name, child) for name, child in model.named_children()]
    return survey(model, blocks, linears(model), calls[0], mixtures=find_mixtures(model))
