"""Keeping for several processes: the first decides what is stored and writes it, the others follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..calibration.row_weights import Weights, told, weights_of
from ..config import AwqConfig
from ..distributed.parcel import pack, unpack
from ..distributed.team import Team
from ..forwards.calls import Call
from ..survey.survey import BlockSurvey
from ..workdir.directory import ResumeError, WorkDirectory
from ..workdir.fingerprint import difference, fingerprint
from ..workdir.result import BlockResult
from .keeping import Keeping


class NotMadeError(RuntimeError):
    """What process 0 could not make for all."""


class SharedKeeping(Keeping):
    """How a process of ``team`` keeps what is made.

    work: in process 0 the directory of what is finished; in others a place of their own for files that nobody reads later, or None.
    """

    def __init__(
        self, team: Team, work: WorkDirectory | None = None, streamed: bool = False, limit: int | None = None
    ) -> None:
        super().__init__(work, streamed, limit)
        self.team = team
        self._held: set[int] = set()

    @property
    def tells(self) -> bool:
        """As for a single process: the first one does."""
        return self.team.leads

    def everyone_needs(self, config: AwqConfig) -> bool:
        """Tell whether all processes take over the new layers: not those of a streamed model that nothing runs on later."""
        return not self.streamed or config.propagate == "quantized" or config.tune_scales > 0

    def begin(self, model: nn.Module, calls: Sequence[Call], config: AwqConfig, blocks: Sequence[str] | None) -> None:
        """Also check that all processes make the same call: ValueError if not."""
        mine = fingerprint(model, calls, config, blocks)
        for rank, other in enumerate(self.team.gathered(mine)):
            if reason := difference(mine, other):
                raise ValueError(f"process {rank} makes another call than process {self.team.rank}: {reason}")
        if self.team.leads:
            super().begin(model, calls, config, blocks)

    def find_held(self, surveys: Sequence[BlockSurvey]) -> None:
        """Learn from process 0 which blocks are finished."""
        holds = super().holds
        self._held = set(self.team.told(lambda: [i for i, one in enumerate(surveys) if one.groups and holds(i)]))

    def holds(self, index: int) -> bool:
        """As in a single process, of which process 0 is the one."""
        return index in self._held

    def remember_text(self, make: Callable[[], Tensor]) -> Tensor:
        """As in a single process: process 0 lets the model write, or finds what it wrote."""
        here = super().remember_text
        return self._from_first(lambda: ({"text": here(make)}, None))[0]["text"]

    def remember_weights(self, calls: Sequence[Call], make: Callable[[], Weights]) -> Weights:
        """As in a single process: process 0 runs the backwards, or finds what they gave."""
        here = super().remember_weights
        return weights_of(*self._from_first(lambda: told(here(calls, make))), calls)

    def _from_first(self, make: Callable[[], tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """Return what ``make`` returns in process 0; where it fails there, in a way that a run may survive, raise in all."""
        failed: Exception | None = None

        def parcel() -> Tensor:
            nonlocal failed
            try:
                tensors, values = make()
            except (ResumeError, OSError):
                raise
            except Exception as error:
                failed = error
                return pack({}, {"failed": f"{type(error).__name__}: {error}"})
            return pack(tensors, {"made": values})

        found = self.team.from_one(0, parcel, "text and weights of rows")
        assert found is not None
        tensors, values = unpack(found)
        if failed is not None:
            raise failed
        if "failed" in values:
            raise NotMadeError(f"process 0: {values['failed']}")
        return tensors, values["made"]

    def load(self, index: int, surveyed: BlockSurvey) -> BlockResult | None:
        """As in a single process: process 0 reads, and sends to the others."""
        if not self.holds(index):
            return None
        here = super().load(index, surveyed)

        def parcel() -> Tensor:
            assert here is not None, "process 0 holds what it says"
            return pack(*here.stored())

        sent = self.team.from_one(0, parcel, "layers")
        return here if self.team.leads else received(sent, surveyed)


def received(parcel: Tensor | None, surveyed: BlockSurvey) -> BlockResult:
    """Put a block's result together that another process sent."""
    assert parcel is not None
    tensors, values = unpack(parcel)
    # clones: layers that share the memory of a parcel could not be freed one by one
    return BlockResult.read({name: one.clone() for name, one in tensors.items()}, values, surveyed.linears)


def keeping_for(
    team: Team | None, work: WorkDirectory | None, streamed: bool = False, limit: int | None = None
) -> Keeping:
    """Make the keeping of a process of ``team``; None: of a process alone."""
    return Keeping(work, streamed, limit) if team is None else SharedKeeping(team, work, streamed, limit)
