"""Measure what quantizing in place did to a model: its logits on a few windows are kept before, and compared with afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards.calls import read_calls, run_call
from ..forwards.mode import calibration_mode
from ..forwards.outputs import logits_of
from ..reporting.scores import LARGE
from ..undo.thread_state import restoring
from .comparison import plus_minus
from .evaluate import Evaluation, evaluate

# what the figures are called in reports and model cards
HELD_OUT = "held-out-calibration"
WINDOWS = 4
# of a window: 1,024 tokens in all, whose logits take 300 MiB in bf16 where a vocabulary has 150,000 tokens
_TOKENS = 256


class Remembered(nn.Module):
    """Answers with the logits that a model gave to the same windows before, one after the other."""

    def __init__(self, windows: Sequence[Tensor], logits: Sequence[Tensor]) -> None:
        super().__init__()
        self.windows, self._logits, self._next = list(windows), list(logits), 0

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the logits of the next window, on its device."""
        found = self._logits[self._next % len(self._logits)]
        self._next += 1
        return found.to(ids.device)


@restoring
@torch.no_grad()
def remember(model: nn.Module, windows: Sequence[Tensor]) -> Remembered:
    """Run ``model`` on the first tokens of windows int64 [1, T], and keep its logits on the CPU, in the model's dtype.

    ValueError for a model whose output has no logits.
    """
    cut = [window[:, :_TOKENS] for window in windows]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with calibration_mode(model):
        calls = read_calls(cut, device, None, "all", _TOKENS, model, scoring=True)
        found = [logits_of(run_call(model, call, index)) for index, call in enumerate(calls)]
    if any(logits is None for logits in found):
        raise ValueError("the model's output has no next-token logits: its divergence cannot be measured")
    return Remembered(cut, [logits.cpu() for logits in found if logits is not None])


def distance(model: nn.Module, before: Remembered) -> Evaluation:
    """Score a quantized model on the windows of ``before``, and against what the float model answered there."""
    return evaluate(model, before.windows, reference=before)


def told(found: Evaluation) -> str:
    """Say the divergence in a sentence."""
    return (
        f"on {found.tokens:,} tokens that were left out of calibration: KL divergence from the float model "
        f"{plus_minus(found['kl'])} nats a token, the same likeliest token for {found['top1'].value:.0%}"
    )


def doubt(found: Evaluation) -> str:
    """Say in words that a divergence is too large for a good result; "" for one that is not."""
    divergence = found["kl"].value
    if not math.isfinite(divergence):
        return "the quantized model computes values that are not finite: it is broken, do not use it"
    if divergence > LARGE:
        return (
            f"the quantized model is far from the float one: {divergence:.2g} nats a token, where less than {LARGE} is usual with "
            "4 bits. Try --method awq+gptq, a smaller --group-size, or --bits 8, and more calibration text"
        )
    return ""
