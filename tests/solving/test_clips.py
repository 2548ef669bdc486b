"""Clips that raise the error of the block's output are taken back, whether layers are sketched first or solved at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from awq_ext import AwqConfig
from awq_ext.calibration.statistics import GroupStatistics, InputStatistics
from awq_ext.folding.fold import LinearFold
from awq_ext.forwards.probe import Probe
from awq_ext.solving.clips import keep_clips_that_serve
from awq_ext.solving.gptq import Quantizer
from awq_ext.solving.rounding import searched
from awq_ext.solving.solution import GroupSolution, LayerSolution
from awq_ext.solving.tasks import GroupTask, LayerTask
from awq_ext.survey.groups import ScaleGroup

N, K, T = 32, 48, 300
FEW, MANY = 20, 100  # rows of the probe: up to K / 2 = 24 of them sketches pay


def clipped_groups(block: nn.ModuleDict, solved: list[str], config: AwqConfig) -> list[GroupSolution]:
    """A group for each Linear, all clipped; ``solved`` gets the name of each that is then solved without its clip."""
    groups = []
    for name, linear in block.items():
        x = torch.randn(T, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
        moment = x.T @ x
        one = InputStatistics(
            SimpleNamespace(
                rows=T, second_moment=lambda moment=moment: moment, abs_sum=lambda x=x: x.double().abs().sum(0)
            ),
            T,
        )
        layer = searched(LayerTask(name, linear, config, one), Quantizer(moment))
        assert layer.clipped
        groups.append(GroupSolution(group_task(layer, one), layers=(watched(layer, solved),)))
    return groups


def group_task(layer: LayerSolution, one: InputStatistics) -> GroupTask:
    name = layer.task.name
    return GroupTask(ScaleGroup((name,), None), GroupStatistics({name: one}), (layer.task,))


def watched(layer: LayerSolution, solved: list[str]) -> LayerSolution:
    def solve() -> LayerSolution:
        solved.append(layer.task.name)
        return layer.unclipped.solve()

    return replace(layer, unclipped=replace(layer.unclipped, solve=solve))


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_clips_that_harm_the_block_are_taken_back(rows: int, method: str) -> None:
    config, kept, undone, spared = AwqConfig(group_size=16, clip="auto", method=method), 0, 0, 0
    for seed in range(8):
        torch.manual_seed(seed)
        block = nn.ModuleDict({name: nn.Linear(K, N, bias=False) for name in "abcd"}).requires_grad_(False)
        solved: list[str] = []
        groups = clipped_groups(block, solved, config)
        # a and b meet inputs like those of calibration, c and d few large ones, along a row of large weights
        xs = {name: torch.randn(rows, K) for name in "ab"}
        xs |= {name: torch.randn(rows, 1) * block[name].weight[:1].sign() for name in "cd"}

        def run(block: nn.ModuleDict = block, xs: dict[str, torch.Tensor] = xs) -> list[torch.Tensor]:
            return [block[name](x) for name, x in xs.items()]

        probe = Probe(run, run())
        before = {layer.task.name: layer for group in groups for layer in group.layers}
        all_clipped = probe.distance({k: v for layer in before.values() for k, v in layer.substitutes().items()})
        found, distance = keep_clips_that_serve(probe, groups)
        layers = {layer.task.name: layer for group in found for layer in group.layers}
        assert distance == probe.distance({k: v for one in layers.values() for k, v in one.substitutes().items()})
        taken_back = [name for name, layer in layers.items() if not layer.clipped]
        assert distance < all_clipped if taken_back else distance == all_clipped
        for name, layer in layers.items():
            wanted = before[name] if layer.clipped else before[name].unclipped.solve()
            assert torch.equal(layer.found.qweight, wanted.found.qweight)
            assert torch.equal(layer.found.scales, wanted.found.scales)
            assert layer.loss == wanted.loss
        asked = solved[: len(solved) - len(taken_back)]
        if rows == MANY or method == "gptq":
            assert sorted(asked) == list("abcd"), "nothing is sketched"
        kept, undone, spared = kept + 4 - len(taken_back), undone + len(taken_back), spared + 4 - len(asked)
    assert kept
    assert undone
    assert (spared > 0) == (rows == FEW and method == "awq")


def test_no_trial_behind_another_linear() -> None:
    """Where 1/s is in another Linear's rows the output is added to the block's: the clip stays, and nothing is solved again."""
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(K, N, bias=False) for name in "ab"}).requires_grad_(False)
    solved: list[str] = []
    first, second = clipped_groups(block, solved, AwqConfig(group_size=16, clip="auto"))
    second = replace(second, fold=LinearFold(block["a"], torch.arange(N)))
    distances = iter(range(100, 0, -1))  # each trial seems better than the one before
    probe = Probe(lambda: torch.tensor([float(next(distances))]), torch.zeros(1))
    found, _ = keep_clips_that_serve(probe, [first, second])
    assert solved == ["a"]
    assert found[1].layers == second.layers
