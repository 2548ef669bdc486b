"""What the first batch shows of sizes: what waits with a batch, and the widest tensor of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block
from awq_ext.survey.survey import survey

WIDTH, INNER, ROWS = 8, 24, 5


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Model(nn.Module):
    """``holds``: whether what goes into the first block stays in a variable until the end."""

    def __init__(self, holds: bool) -> None:
        super().__init__()
        self.blocks, self.holds = nn.ModuleList(Inner() for _ in range(3)), holds

    def forward(self, x: Tensor) -> Tensor:
        first = x = x * 2
        if not self.holds:
            del first
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("holds", [False, True])
def test_what_the_model_holds_waits_too(holds: bool) -> None:
    model = Model(holds)
    blocks = [Block(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = survey(model, blocks, linears, Call((torch.randn(ROWS, WIDTH),)))
    entry = ROWS * WIDTH * 4
    assert [one.input_bytes for one in found] == [entry] * 3
    assert [one.kept_bytes for one in found] == [0, *([entry] * 2 if holds else [0, 0])]
    assert [one.widest_bytes for one in found] == [ROWS * INNER * 4] * 3
