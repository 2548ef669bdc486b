"""Rows of experts: hashes of their bits, and hooks that see each call once."""

from __future__ import annotations

import pytest
import torch
from checks import hook_count
from mixtures import linears, surveyed
from torch import Tensor, nn

from awq_ext.forwards.calls import Call
from awq_ext.survey.expert_groups import MixtureWatch
from awq_ext.survey.expert_rows import row_hashes, row_tensors
from awq_ext.survey.mixtures import find_mixtures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hashes_tell_rows_by_their_bits(dtype: torch.dtype) -> None:
    rows = torch.randn(700, 33).to(dtype)
    order = torch.randperm(700)
    hashes = row_hashes(rows)
    assert hashes.shape == (700,)
    assert len(set(hashes.tolist())) == 700
    assert torch.equal(row_hashes(rows[order]), hashes[order])
    assert torch.equal(row_hashes(rows.view(7, 100, 33).transpose(0, 1)), hashes.view(7, 100).T.flatten())
    changed = rows.clone()
    changed[3, 7] = -changed[3, 7]
    assert (row_hashes(changed) != hashes).nonzero().tolist() == [[3]]
    assert row_hashes(rows[:0]).shape == (0,)


def test_rows_are_those_of_floating_point_tensors_with_rows() -> None:
    rows, ids, scalar = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.randn(3)
    assert [place for place, _ in row_tensors((ids, {"a": [scalar, rows], "b": None, "c": rows}))] == [2, 4]


class TwoLists(nn.Module):
    """Lists of different lengths, whose Linears all read every row."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.other = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(linear(x) for linear in (*self.one, *self.other))


def test_lists_of_one_module_are_no_experts_if_they_read_every_row() -> None:
    """Their module is called once, however many lists it holds: else no Linear would seem to read all rows."""
    model = nn.Sequential(TwoLists())
    (found,) = surveyed(model, [Call((torch.randn(2, 5, 8),))])
    (group,) = found.groups
    assert set(group.linears) == set(linears(model))
    assert group.experts == frozenset()


def test_hooks_are_taken_off() -> None:
    model = nn.Sequential(TwoLists(), nn.LayerNorm(8))
    before = hook_count(model)
    with MixtureWatch(find_mixtures(model)).on({"1": model[1]}):
        assert hook_count(model) == before + 7
    assert hook_count(model) == before
