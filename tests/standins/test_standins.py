"""Linears that stand in for other layers: put in, put back, and undone."""

from __future__ import annotations

import pytest
import torch
from checks import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import awq_ext
from awq_ext.forwards.calls import Call
from awq_ext.standins.expert_linears import ExpertLinears
from awq_ext.standins.standins import stand_in, stand_in_as, transposed_layers
from awq_ext.undo.journal import Journal


class Transposed(nn.Module):
    """Like Conv1D of transformers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Fused(nn.Module):
    """Two experts in one parameter, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for e in range(2):
            x = F.linear(x, self.experts[e])
        return x


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Transposed(3, 4), Fused(), nn.Linear(4, 2))


CALL = Call((torch.randn(2, 5, 3),))


def nothing(*_: object) -> None:
    """No layer shall stay as it is."""


def test_stand_ins_compute_the_same_and_can_be_undone() -> None:
    made = model()
    before, expected = Snapshot(made), made(*CALL.args)
    with pytest.raises(ZeroDivisionError), Journal() as journal:
        standins = stand_in(made, CALL, nothing, journal)
        assert list(standins.transposed) == ["0"]
        assert [fused.name for fused in standins.unfused.weights] == ["1.experts"]
        assert type(made[0]) is nn.Linear
        assert isinstance(made[1].experts, ExpertLinears)
        torch.testing.assert_close(made(*CALL.args), expected)
        assert made[0].weight.data_ptr() == standins.transposed["0"].weight.data_ptr()
        raise ZeroDivisionError
    before.assert_unchanged()


def test_what_nothing_was_done_to_is_put_back_itself() -> None:
    made = model()
    before = Snapshot(made)
    with Journal() as journal:
        stand_in(made, CALL, nothing, journal).put_back(made, journal)
    before.assert_unchanged()


def test_a_stand_in_with_other_weights_gives_them_to_what_is_put_back() -> None:
    made = model()
    original = made[0]
    with Journal() as journal:
        standins = stand_in(made, CALL, nothing, journal)
        weight = torch.randn(4, 3)
        made[0].weight, made[1].experts[1]._module.weight = nn.Parameter(weight), nn.Parameter(torch.eye(4))
        standins.put_back(made, journal)
    assert type(made[0]) is Transposed
    assert made[0] is not original
    assert torch.equal(made[0].weight, weight.T)
    assert made[0].bias is original.bias
    assert torch.equal(made[1].experts[1], torch.eye(4))


def test_experts_beside_a_quantized_one_keep_no_more_than_their_own_weights() -> None:
    made = model()
    whole = made[1].experts.untyped_storage().nbytes()
    with Journal() as journal:
        standins = stand_in(made, CALL, nothing, journal)
        made[1].experts._modules["0"] = awq_ext.QuantLinear(4, 4, -1)
        standins.put_back(made, journal)
    left = made[1].experts._modules["1"]
    assert left.weight.untyped_storage().nbytes() == whole // 2


def test_layers_that_shall_stay_are_not_taken_apart() -> None:
    made = model()
    experts = made[1].experts
    with Journal() as journal:
        standins = stand_in(made, CALL, lambda name, _: "not this" if "experts" in name else None, journal)
    assert made[1].experts is experts
    assert standins.unfused.reasons == {"1.experts": "not this"}
    assert standins.unfused.refused == []  # it was not the batch that showed it


def test_only_experts_that_are_much_of_the_model_are_worth_a_warning() -> None:
    class Whole(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts.sum()

    made = nn.Sequential(Whole(), nn.Linear(4, 4))
    with Journal() as journal:
        standins = stand_in(made, Call((torch.randn(3, 4),)), nothing, journal)
    assert standins.warnings(100) == ["0.experts stay float, 32.0% of all parameters: sum uses all of it"]
    assert standins.warnings(10_000) == []


def test_a_shared_transposed_weight_stays() -> None:
    one, other = Transposed(3, 3), Transposed(3, 3)
    other.weight = one.weight
    assert list(transposed_layers(nn.ModuleList([one, other, Transposed(3, 3)]))) == ["2"]


def test_the_layers_of_a_checkpoint_stand_in_by_their_sizes() -> None:
    made = model()
    with Journal() as journal:
        stand_in_as(made, {"0": (3, 4), "gone": (1, 1), "2": (4, 2)}, {"1.experts": "linear"}, journal)
    assert type(made[0]) is nn.Linear
    assert isinstance(made[1].experts, ExpertLinears)
    other = model()
    with Journal() as journal:
        stand_in_as(other, {"0": (4, 3)}, {}, journal)
    assert type(other[0]) is Transposed
    with pytest.raises(ValueError, match="holds no fused experts"), Journal() as journal:
        stand_in_as(other, {}, {"1.experts": "other"}, journal)
