"""BlockSolver on a block of two Linears and made-up statistics: when it retreats from folds, scales and biases, and to what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_ext import AwqConfig, kernels
from awq_ext.calibration.statistics import GroupStatistics, InputStatistics
from awq_ext.folding.fold import Fold, LinearFold, NormFold
from awq_ext.forwards.lockstep import Block
from awq_ext.forwards.probe import Probe
from awq_ext.solving import block_solver
from awq_ext.solving.block_solver import BlockSolver
from awq_ext.solving.scales import ScaleChoice
from awq_ext.survey.groups import ScaleGroup
from awq_ext.survey.survey import BlockSurvey

HIDDEN, INNER, ROWS = 32, 48, 200


class Feed(nn.Module):
    """norm -> up -> ReLU -> down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(HIDDEN).mul(2).exp())
            self.up.weight.mul_(torch.randn(INNER, 1).exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class FixedFolds:
    """A finder that proves nothing."""

    def __init__(self, folds: Sequence[Fold | None]) -> None:
        self.folds = list(folds)

    def find(self, *_: Any) -> list[Fold | None]:
        return self.folds


def seen(x: Tensor, mask: Tensor | None = None) -> InputStatistics:
    stats = kernels.activation_stats(x.shape[-1])
    stats.update(x, mask)
    return InputStatistics(stats, len(x))


def solver(
    block: nn.Module,
    inputs: dict[str, Tensor],
    folds: Sequence[Fold | None] = (None, None),
    groups: Sequence[ScaleGroup] | None = None,
    **settings: Any,
) -> BlockSolver:
    """For Linears by name, each with its input; a group each unless ``groups`` says otherwise."""
    linears = {name: block.get_submodule(name) for name in inputs}
    groups = groups or [ScaleGroup((name,), None) for name in inputs]
    statistics = [GroupStatistics({name: seen(inputs[name]) for name in group.linears}) for group in groups]
    x = torch.randn(50, HIDDEN).to(next(block.parameters()).dtype)
    probe = Probe(lambda: block(x), block(x))
    biases = {linear for linear in linears.values() if linear.bias is not None}
    config = AwqConfig(group_size=16, n_grid=4, **settings)
    surveyed = BlockSurvey(Block("", block), linears, groups, 0)
    return BlockSolver(surveyed, statistics, probe, config, FixedFolds(folds), biases)


@pytest.fixture
def feed() -> tuple[Feed, dict[str, Tensor]]:
    torch.manual_seed(1)  # a draw in which both groups gain from a scale
    block = Feed()
    x = block.norm(torch.randn(ROWS, HIDDEN)).detach()
    return block, {"up": x, "down": torch.relu(block.up(x)).detach()}


@torch.no_grad()
def test_right_folds_are_kept(feed: Any) -> None:
    block, inputs = feed
    folds = [NormFold(block.norm, "plain"), LinearFold(block.up, torch.arange(INNER))]
    (up, down), report = solver(block, inputs, folds).solve()
    assert (up.fold, down.fold) == tuple(folds)
    assert torch.equal(up.layers[0].divisor, down.choice.scale)
    assert report.note == ""
    assert 0 < report.fold_error < 1e-6
    assert 0 < report.output_error < 0.2
    for group in (up, down):
        assert group.layers[0].loss < group.layers[0].loss_rtn


@torch.no_grad()
def test_folds_that_move_the_float_output_are_given_up(feed: Any) -> None:
    block, inputs = feed
    wrong = LinearFold(block.up, torch.arange(INNER).flip(0))
    groups, report = solver(block, inputs, [NormFold(block.norm, "plain"), wrong]).solve()
    assert report.note.startswith("no folds: they would move its float output by")
    assert report.fold_error == 0
    assert [group.fold for group in groups] == [None, None]
    assert all(layer.divisor is None for group in groups for layer in group.layers)


@torch.no_grad()
def test_a_fold_that_costs_a_linear_more_than_rtn_is_given_up(feed: Any) -> None:
    block, inputs = feed
    # exact codes, from 0 to 15 in each group of 16: whatever divides the rows only loses
    codes = torch.randint(0, 16, (INNER, HIDDEN)).float()
    codes[:, ::16], codes[:, 1::16] = 0, 15
    block.up.weight.copy_(codes / 16)
    inputs["down"] = torch.relu(block.up(inputs["up"])) * torch.randn(INNER).exp()
    (up, down), report = solver(block, inputs, [None, LinearFold(block.up, torch.arange(INNER))]).solve()
    assert report.note == ""
    assert up.layers[0].divisor is None
    assert up.layers[0].loss == up.layers[0].loss_rtn == pytest.approx(0, abs=1e-9)
    assert down.fold is None
    assert down.choice.scale is not None, "it divides at run time"


@torch.no_grad()
@pytest.mark.parametrize("fold", ["auto", "always"])
def test_a_scale_that_loses_to_rtn_is_left_out(feed: Any, fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = feed
    bad = torch.logspace(-3, 3, HIDDEN)
    monkeypatch.setattr(block_solver, "search_scale", lambda *_, **__: ScaleChoice(bad, "plain", 0.5))
    made = solver(block, {"up": inputs["up"]}, [NormFold(block.norm, "plain")], fold=fold, clip=False)
    ((up,), _) = made.solve()
    assert up.choice.scale is None
    assert up.fold is None
    assert up.layers[0].scale is None
    assert up.layers[0].loss <= up.layers[0].loss_rtn


class Experts(nn.Module):
    """Two Linears, each called with rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(HIDDEN, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[::2]) + self.b(x[1::2])


EXPERTS = ScaleGroup(("a", "b"), None, (("a",), ("b",)), experts=frozenset("ab"))


@torch.no_grad()
def test_an_expert_alone_does_without_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Experts()
    loud = torch.ones(HIDDEN)
    loud[3] = 30
    # what protects the loud channel of one is wrong for the other, whose codes are exact
    codes = torch.randint(0, 16, (8, HIDDEN)).float()
    codes[:, ::16], codes[:, 1::16] = 0, 15
    block.b.weight.copy_(codes / 16)
    inputs = {"a": torch.randn(ROWS, HIDDEN) * loud, "b": torch.randn(ROWS, HIDDEN)}
    monkeypatch.setattr(block_solver, "search_scale", lambda *_, **__: ScaleChoice(loud**0.5, "plain", 0.5))
    ((group,), _) = solver(block, inputs, [None], [EXPERTS], clip=False).solve()
    a, b = group.layers
    assert torch.equal(a.scale, loud**0.5)
    assert a.loss < a.loss_rtn
    assert b.scale is None
    assert b.loss <= b.loss_rtn
    assert [row.applied for row in group.reports()] == ["run time", ""]


@torch.no_grad()
def test_an_expert_that_few_rows_reached_is_rounded_to_nearest() -> None:
    block = Experts()
    inputs = {"a": torch.randn(ROWS, HIDDEN), "b": torch.randn(3, HIDDEN)}
    ((group,), _) = solver(block, inputs, [None], [EXPERTS], min_tokens=4).solve()
    a, b = group.layers
    assert a.task.problem == ""
    assert b.task.problem == "3 calibration rows, fewer than min_tokens=4"
    assert b.seldom_called
    assert (b.method, b.loss, b.scale) == ("rtn", None, None)


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_inputs_are_a_problem_of_their_linear_alone(feed: Any, bad: float) -> None:
    block, inputs = feed
    inputs["down"] = inputs["down"].clone().index_fill_(0, torch.tensor([3]), bad)
    (up, down), _ = solver(block, inputs).solve()
    assert up.layers[0].task.problem == ""
    assert down.layers[0].task.problem == "its calibration input holds NaN or Inf"
    assert down.layers[0].method == "rtn"


@torch.no_grad()
def test_masks_that_leave_no_row_are_an_error(feed: Any) -> None:
    block, inputs = feed
    made = solver(block, inputs)
    made._statistics[1].inputs["down"] = seen(inputs["down"], torch.zeros(ROWS, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"down: all {ROWS} calibration rows are masked out"):
        made.solve()


@torch.no_grad()
def test_a_search_around_the_mean_is_given_up_where_the_bias_is_too_coarse() -> None:
    block = nn.Sequential(nn.Linear(HIDDEN, 8)).to(torch.bfloat16)
    inputs = {"0": torch.randn(ROWS, HIDDEN) + 5}
    for size, centred in ((0.1, True), (3e4, False)):
        block[0].bias.fill_(size)
        ((group,), _) = solver(block, inputs, [None], clip=False).solve()
        (layer,) = group.layers
        assert layer.task.centred == centred
        assert layer.corrects_bias
        assert layer.loss <= layer.loss_rtn
