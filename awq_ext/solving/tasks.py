"""What is known of a Linear, and of a scale group, before it is solved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..calibration.statistics import GroupStatistics, InputStatistics
from ..config import AwqConfig
from ..survey.groups import ScaleGroup

NO_ROWS = "no calibration row reached it"


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A Linear to quantize: its settings and the statistics of its input.

    problem: why these statistics cannot guide a search, or "". corrects_bias: whether its bias may take over its mean error.
    centred: whether the search then uses the second moment around the mean; not where the bias is too coarse for that.
    """

    name: str
    linear: nn.Linear
    settings: AwqConfig
    input: InputStatistics
    problem: str = ""
    corrects_bias: bool = False
    centred: bool = False

    @property
    def weight(self) -> Tensor:
        """The Linear's weight [N, K], detached."""
        return self.linear.weight.detach()

    @property
    def second_moment(self) -> Tensor:
        """The second moment that the search uses: fp32 [K, K]."""
        return self.input.guide(self.centred)


@dataclass(frozen=True, eq=False)
class GroupTask:
    """A scale group to solve: its statistics, and a task for each of its Linears."""

    group: ScaleGroup
    statistics: GroupStatistics
    layers: tuple[LayerTask, ...]

    @property
    def settings(self) -> AwqConfig:
        """Settings of the first Linear: all Linears of a group have its method, and are packed as it is."""
        return self.layers[0].settings

    @property
    def usable(self) -> list[LayerTask]:
        """The Linears whose statistics can guide a search."""
        return [task for task in self.layers if not task.problem]


def problem_of(given: InputStatistics, min_tokens: int) -> str:
    """Say why the statistics of an input cannot guide a search; "" if they can."""
    if given.rows == 0:
        return NO_ROWS
    if not given.finite:
        return "its calibration input holds NaN or Inf"
    return f"{given.rows} calibration rows, fewer than min_tokens={min_tokens}" if given.rows < min_tokens else ""
