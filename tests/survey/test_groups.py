"""Which Linears share an input, and which norm makes it."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

from awq_ext.modules import norm_candidates
from awq_ext.survey.groups import Watch


def groups_of(block: nn.Module, x: Tensor) -> dict[tuple[str, ...], str | None]:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    watch = Watch()
    with watch.on(linears, norm_candidates(block)), torch.no_grad():
        block(x)
    return {group.linears: group.producer for group in watch.groups(linears)}


def hidden() -> Tensor:
    return torch.randn(2, 5, models.HIDDEN)


def test_a_llama_block() -> None:
    assert groups_of(models.LlamaBlock(), hidden()) == {
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"): "input_norm",
        ("attention.o_proj",): None,
        ("mlp.gate_proj", "mlp.up_proj"): "post_norm",
        ("mlp.down_proj",): None,
    }


@pytest.mark.parametrize("block", [models.TwiceBlock, models.TapBlock, models.KeywordBlock])
def test_blocks_that_call_in_other_ways(block: type[nn.Module]) -> None:
    assert groups_of(block(), hidden()) == {("up",): "norm", ("down",): None}


def test_a_linear_never_called_is_in_no_group() -> None:
    assert groups_of(models.UncalledBlock(), hidden()) == {("up",): "norm", ("down",): None}


def test_equal_values_in_other_memory_are_another_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone()) + self.c(x)

    assert groups_of(Two(), torch.randn(2, 4)) == {("a", "c"): None, ("b",): None}


def test_a_tensor_changed_in_between_is_another_input() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = models.Norm(4)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            y = self.a(h)
            h.add_(1)
            return y + self.b(h)

    assert groups_of(Changed(), torch.randn(2, 4)) == {("a",): "norm", ("b",): None}


def test_freed_memory_is_not_taken_for_the_input_it_held() -> None:
    """The allocator gives the second input the address of the first; they are two inputs all the same."""

    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            y = self.a(h)
            del h
            h = x * 3
            return y + self.b(h)

    assert groups_of(Reuse(), torch.randn(9, 64)) == {("a",): None, ("b",): None}


def test_the_same_linears_called_with_different_partners_are_apart() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.b(x))

    assert groups_of(Cross(), torch.randn(2, 4)) == {("a",): None, ("b",): None}
