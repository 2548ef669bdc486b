"""What processes of a team send each other, and that there is no team without others."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import team
import torch
from torch import distributed as dist

from awq_ext.distributed.parcel import pack, unpack
from awq_ext.distributed.team import Team, TeamError, teamed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def exchanged(one: Team) -> None:
    """Parcels of different lengths, some of them empty, to each from each."""
    parcels = [torch.full((one.rank * 3 + to,), 10 * one.rank + to, dtype=torch.uint8) for to in range(one.size)]
    arrived = one.exchange(parcels, "parcels")
    for source, parcel in enumerate(arrived):
        assert torch.equal(parcel, torch.full((source * 3 + one.rank,), 10 * source + one.rank, dtype=torch.uint8))
    assert one.moved["parcels"] == sum(len(parcel) for to, parcel in enumerate(parcels) if to != one.rank)


def told(one: Team) -> None:
    assert one.told(lambda: {"from": one.rank}) == {"from": 0}
    assert one.gathered(one.rank) == list(range(one.size))
    found = one.from_one(1, lambda: pack({"x": torch.arange(5)}), "layers", everyone=False)
    assert (found is None) == (one.rank not in (0, 1))
    if found is not None:
        assert torch.equal(unpack(found)[0]["x"], torch.arange(5))


def posted(one: Team) -> None:
    if one.rank == 1:
        one.post("note", "folds")
    assert one.read("note") == "folds"


def main() -> None:
    dist.init_process_group("gloo")
    with teamed(timeout=30) as one:
        assert one is not None and one.leads == (one.rank == 0)
        for action in (exchanged, told, posted):
            action(one)
    with teamed(timeout=30) as again:  # a team ends as a whole, and another can follow
        assert again is not None
        again.meet()
    dist.destroy_process_group()


def test_what_is_sent_arrives() -> None:
    assert not any(team.run(3, [str(Path(__file__))]))


def test_there_is_no_team_without_others() -> None:
    with teamed() as nobody:
        assert nobody is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with teamed() as nobody:
            assert nobody is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan])
def test_a_timeout_must_be_a_time(timeout: float) -> None:
    with pytest.raises(ValueError, match="a number of seconds above 0"), teamed(timeout):
        pass


def test_the_error_is_a_runtime_error() -> None:
    """Which programs that know nothing of teams catch."""
    assert issubclass(TeamError, RuntimeError)


if __name__ == "__main__":
    sys.exit(main())
