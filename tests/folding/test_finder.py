"""A block's folds tried in the next one: the same outcome as a search, in fewer runs, whatever the next block is like."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from awq_ext.folding.finder import FoldFinder
from awq_ext.folding.fold import Fold, LinearFold
from awq_ext.folding.proof import find_folds
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block
from awq_ext.forwards.probe import Probe
from awq_ext.modules import norm_candidates
from awq_ext.survey.survey import BlockSurvey, survey

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Tapped(models.LlamaBlock):
    """The second norm's output is read by the residual too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.post_norm(x + self.attention(self.input_norm(x)))
        return h + self.mlp(h)


class Swapped(models.LlamaBlock):
    """The gated product is made of what no row of ``up_proj`` reaches in proportion."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        h = self.post_norm(x)
        return x + self.mlp.down_proj(self.mlp.gate_proj(h) * nn.functional.silu(self.mlp.up_proj(h)))


class Silent(models.LlamaBlock):
    """What reads the second norm has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        return x + 0 * self.mlp(self.post_norm(x))


def offset() -> nn.Module:
    return models.Norm(offset=True)


def surveys_of(*blocks: nn.Module, x: Tensor) -> tuple[list[BlockSurvey], dict[str, nn.Module]]:
    model = nn.Sequential(*blocks)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return survey(model, [Block(str(i), b) for i, b in enumerate(blocks)], linears, Call((x,))), norm_candidates(model)


class Runs:
    """A probe of a block, and how often it was run."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self.count = -1
        self._block, self._x = block, x
        self.probe = Probe(self._run, self._run())

    @torch.no_grad()
    def _run(self) -> Any:
        self.count += 1
        return self._block(self._x.clone())


def described(folds: list[Fold | None]) -> list[Any]:
    return [fold and (fold.module, fold.rows.tolist() if isinstance(fold, LinearFold) else fold.kind) for fold in folds]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [models.Norm, models.layer_norm, offset])
def test_alike_blocks_are_searched_once(norm: Any, dtype: torch.dtype) -> None:
    blocks = [models.LlamaBlock(norm).to(dtype) for _ in range(3)]
    x = torch.randn(2, 7, models.HIDDEN).to(dtype)
    surveys, norms = surveys_of(*blocks, x=x)
    finder = FoldFinder(norms)
    for i, (one, block) in enumerate(zip(surveys, blocks, strict=True)):
        wanted = [True] * len(one.groups)
        runs, other = Runs(block, x), Runs(block, x)
        folds = finder.find(runs.probe, one.groups, one.linears, wanted)
        assert None not in folds
        assert described(folds) == described(find_folds(other.probe, one.groups, one.linears, norms, wanted))
        if i:  # inputs as they are, each norm alone, all together; float16 proves norms and Linears apart
            assert runs.count < other.count
            assert runs.count == 4 or dtype == torch.float16


@pytest.mark.parametrize("block", [Tapped, Swapped, Silent, lambda: models.LlamaBlock(offset)])
@pytest.mark.parametrize("first", [models.LlamaBlock, Swapped])
def test_another_block_is_searched(block: Any, first: Any) -> None:
    blocks = [first(), block(), first()]
    x = torch.randn(2, 7, models.HIDDEN)
    surveys, norms = surveys_of(*blocks, x=x)
    finder = FoldFinder(norms)
    for one, module in zip(surveys, blocks, strict=True):
        wanted = [True] * len(one.groups)
        folds = finder.find(Runs(module, x).probe, one.groups, one.linears, wanted)
        expected = find_folds(Runs(module, x).probe, one.groups, one.linears, norms, wanted)
        assert described(folds) == described(expected)


def test_groups_that_want_no_fold_cost_no_run() -> None:
    block = models.LlamaBlock()
    x = torch.randn(2, 7, models.HIDDEN)
    (one,), norms = surveys_of(block, x=x)
    runs = Runs(block, x)
    for _ in range(2):
        folds = FoldFinder(norms).find(runs.probe, one.groups, one.linears, [False] * len(one.groups))
        assert folds == [None] * len(one.groups)
    assert runs.count == 0
