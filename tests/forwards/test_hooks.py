"""Hooks: what they see and replace, and that they are gone whatever ends the block that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import hook_count
from torch import Tensor, nn

from awq_ext.forwards.hooks import Hooks


class Add(nn.Module):
    def forward(self, x: Tensor, *, more: int = 0) -> Tensor:
        return x + more


def test_hooks_see_inputs_and_outputs_in_order() -> None:
    module, x, seen = Add(), torch.zeros(2), []
    with Hooks() as on:
        on.input(module, lambda args, kwargs: seen.append((args, kwargs)))
        on.output(module, seen.append)
        output = module(x, more=3)
    assert seen == [((x,), {"more": 3}), output]
    module(x)
    assert len(seen) == 2


def test_what_sees_an_input_returns_in_vain_and_what_sees_an_output_replaces_it() -> None:
    module, x = Add(), torch.zeros(2)
    with Hooks() as on:
        on.input(module, lambda *_: "ignored")
        on.output(module, lambda output: output + 1)
        assert torch.equal(module(x), torch.ones(2))


@pytest.mark.parametrize("broken", ["body", "module"])
def test_an_error_leaves_no_hook(broken: str) -> None:
    modules: list[Any] = [Add(), Add(), None if broken == "module" else Add()]
    with pytest.raises((ZeroDivisionError, AttributeError)), Hooks() as on:
        for module in modules:
            on.input(module, print)
            on.output(module, print)
        raise ZeroDivisionError
    assert hook_count(nn.ModuleList(modules[:2])) == 0
