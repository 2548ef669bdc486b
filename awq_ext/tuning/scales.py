"""Scales of weight groups tuned end to end, codes fixed (as DWQ of mlx-lm and EfficientQAT, arXiv 2407.11062, section 3.3, do).

Every layer was rounded by itself. What the layers' errors do together only the whole model tells: its KL divergence from the
float model is lowered by gradient steps on the scales, of which there is one for each group and output. Codes and zeros stay, so
that nothing changes for formats and kernels. Windows that take no part decide whether the new scales stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.gradients import checkpointed, without_gradients
from ..forwards.calls import CalibrationError, Call, run_call
from ..forwards.outputs import logits_of, targets_of
from ..layers.quant_linear import QuantLinear
from ..reporting.progress import Progress
from ..undo import interrupt
from .predictions import BYTES, Predictions, divergence

# Of Adam's steps, as a share of a scale. They fall to 0 by a cosine, after a tenth of all steps in which they rise.
RATE = 1e-3
_DECAYS = (0.9, 0.99)
# Parts and multiples of the way that all steps went together, tried on the held-out batches.
LENGTHS = (0.5, 1.5, 2.0)
# One batch of so many is kept for the decision.
HELD = 8
_HINT = " tune_scales runs it with gradients: tune_scales=0 needs none."


@dataclass(frozen=True)
class Tuning:
    """What tuning did: the mean KL divergence on the windows that took no part, before and after, in nats a position."""

    before: float
    after: float
    batches: int
    held: int

    @property
    def kept(self) -> bool:
        """Whether the new scales stay."""
        return self.after < self.before


def float_predictions(model: nn.Module, calls: Sequence[Call], progress: bool = False) -> list[Predictions]:
    """Keep what ``model`` predicts for every batch. CalibrationError if it returns no logits for its token ids, or no numbers."""
    kept = []
    with torch.no_grad(), Progress(len(calls), "predicting", "batch", progress, part=True) as bar:
        for index, call in enumerate(calls):
            logits = _logits(run_call(model, call.on_copies(), index), call, index)
            kept.append(Predictions.of_logits(logits, call.row_mask(logits)))
            if not kept[-1].usable:
                raise CalibrationError(f"the logits of calibration batch {index} are NaN or Inf")
            bar.update()
    return kept


def tuning_bytes(tokens: int, groups: int) -> int:
    """Estimate what tuning holds beside the model: predictions of each token, and for each group's scale eight numbers.

    Five are fp32 (its start, its step, two means of Adam's, a gradient), three 16-bit (old, new, the gradient's).
    """
    return BYTES * tokens + 26 * groups


def tune_scales(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    layers: Sequence[QuantLinear],
    batches: Sequence[tuple[Call, Predictions]],
    passes: int,
    progress: bool = False,
) -> Tuning:
    """Tune the scales of ``layers``, which are in ``model``; they keep their old scales unless the held-out windows gain.

    blocks: modules that keep only their inputs for a backward, and run once more in it. passes: how often each batch is seen. At
    least two batches are needed. Raises CalibrationError for a model that cannot be differentiated; after any exception the
    scales are as they were.
    """
    held = range(min(HELD, len(batches)) // 2, len(batches), HELD)
    judged, seen = [batches[i] for i in held], [one for i, one in enumerate(batches) if i not in held]
    if not judged or not seen:
        raise CalibrationError(f"{len(batches)} calibration batches: tuning scales needs two at least")
    order = torch.Generator().manual_seed(0)
    with _trained(layers) as scales, without_gradients(model), checkpointed(blocks, model):
        before = _judge(model, judged)
        steps = _Steps(scales, passes * len(seen))
        with Progress(passes * len(seen), "tuning scales", "batch", progress, part=True) as bar:
            for _ in range(passes):
                for index in torch.randperm(len(seen), generator=order).tolist():
                    _backward(model, *seen[index], index)
                    steps.take()
                    bar.update()
        tuning = Tuning(before, _best_length(model, scales, judged), len(seen), len(judged))
        if tuning.kept:
            scales.keep()
    return tuning


def _best_length(model: nn.Module, scales: _Scales, judged: Sequence[tuple[Call, Predictions]]) -> float:
    """Leave the scales as far along the way that they went as the held-out batches like best; return the divergence there.

    Few batches tell a direction well and a length badly: most of a step is noise of its batch.
    """
    best, found = 1.0, _judge(model, judged)
    for length in LENGTHS:
        scales.write(length)
        if (divergence_there := _judge(model, judged)) < found:
            best, found = length, divergence_there
    scales.write(best)
    return found


class _Scales:
    """The scales of some layers while they are trained: scale = start * exp(theta)."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self._layers = layers
        self._old = [layer.tile_scales for layer in layers]
        self._start = [old.float() for old in self._old]
        self.thetas = [torch.zeros_like(start) for start in self._start]
        self._kept = False
        self.write()

    def write(self, length: float = 1.0) -> None:
        """Round the scales to their storage type and give them to the layers: what is trained is what will run.

        length: by which all thetas are multiplied first.
        """
        with torch.no_grad():
            for layer, old, start, theta in zip(self._layers, self._old, self._start, self.thetas, strict=True):
                most = torch.finfo(old.dtype).max
                layer.tile_scales = (start * (length * theta).exp()).clamp(-most, most).to(old.dtype).requires_grad_()

    def gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradient of each theta since the last :meth:`write`; None for a layer that did not run."""
        for layer in self._layers:
            scale = layer.tile_scales
            yield None if scale.grad is None else scale.grad.float() * scale.detach().float()

    def keep(self) -> None:
        """Let the layers have these scales for good."""
        self._kept = True

    def close(self) -> None:
        """Give the layers their old scales, or the new ones if these are kept, without gradients."""
        for layer, old in zip(self._layers, self._old, strict=True):
            layer.tile_scales = layer.tile_scales.detach() if self._kept else old


@contextmanager
def _trained(layers: Sequence[QuantLinear]) -> Iterator[_Scales]:
    scales = _Scales(layers)
    try:
        yield scales
    finally:
        scales.close()


class _Steps:
    """Adam on the logarithms of the scales, in steps that rise and then fall by a cosine."""

    def __init__(self, scales: _Scales, count: int) -> None:
        self._scales, self._count, self._done = scales, count, 0
        self._optimizer = torch.optim.Adam([nn.Parameter(theta) for theta in scales.thetas], lr=RATE, betas=_DECAYS)
        # the optimizer moves what the layers read: a Parameter shares its tensor's memory
        self._parameters = self._optimizer.param_groups[0]["params"]

    def take(self) -> None:
        """Make one step down the gradients that the layers have now; none where these are no numbers."""
        gradients = list(self._scales.gradients())
        self._done += 1
        if not all(one is None or bool(one.isfinite().all()) for one in gradients):
            self._scales.write()
            return
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        rise = min(1.0, self._done / max(1.0, self._count / 10))
        fall = 0.5 * (1 + math.cos(math.pi * (self._done - 1) / self._count))
        self._optimizer.param_groups[0]["lr"] = RATE * rise * fall
        self._optimizer.step()
        self._scales.write()


def _judge(model: nn.Module, batches: Sequence[tuple[Call, Predictions]]) -> float:
    """Average the divergence from the predictions over all positions of some batches."""
    total = 0.0
    with torch.no_grad():
        for index, (call, expected) in enumerate(batches):
            logits = _logits(run_call(model, call.on_copies(), index), call, index)
            total += divergence(logits, expected)[0]
    return total / max(1, sum(len(expected.positions) for _, expected in batches))


def _backward(model: nn.Module, call: Call, expected: Predictions, index: int) -> None:
    """Find the gradients of the scales for one batch."""
    with torch.enable_grad():
        logits = _logits(run_call(model, call.on_copies(_HINT), index), call, index)
        if not logits.requires_grad:
            raise CalibrationError(f"the logits of calibration batch {index} do not depend on any scale.{_HINT}")
        interrupt.check()
        try:
            torch.autograd.backward([logits], [divergence(logits, expected)[1]])
        except RuntimeError as error:
            raise CalibrationError(f"no gradient of calibration batch {index}: {error}.{_HINT}") from error


def _logits(result: object, call: Call, index: int) -> Tensor:
    logits, ids = logits_of(result), targets_of(call)
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        raise CalibrationError(f"calibration batch {index}: the model returned no logits for every token id")
    return logits
