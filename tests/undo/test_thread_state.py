"""Grad mode and autocast: the caller's own, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from torch import nn

import awq_ext
from awq_ext.undo.thread_state import ThreadState, restoring


class Interrupted(nn.Module):
    """Ctrl-C comes while the ``no_grad`` of the model's own forward is on its way out."""

    def __init__(self) -> None:
        super().__init__()
        self.real = models.make("llama").model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.real(ids)
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        raise KeyboardInterrupt


VERBS: dict[str, Callable[[nn.Module, list[torch.Tensor]], object]] = {
    "evaluate": awq_ext.evaluate,
    "compare": lambda model, batches: awq_ext.compare(model, batches, {"x": batches}, ["rtn"], progress=False),
    "salience": lambda model, batches: awq_ext.salience(model, batches, progress=False),
    "sensitivity": lambda model, batches: awq_ext.sensitivity(model, batches, progress=False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_forward_leaves_no_mode_behind(verb: str) -> None:
    before = ThreadState.capture()
    try:
        with pytest.raises(KeyboardInterrupt):
            VERBS[verb](Interrupted(), models.token_batches())
        assert ThreadState.capture() == before
    finally:
        before.apply()


def test_restoring_passes_everything_on() -> None:
    @restoring
    def changed(value: int, *, more: int) -> int:
        """Its name."""
        torch.set_grad_enabled(False)
        return value + more

    assert changed(1, more=2) == 3 and torch.is_grad_enabled()
    assert changed.__name__ == "changed" and changed.__doc__ == "Its name."
