"""Tuning of scales within quantize(): what the float model predicts is kept before the blocks are solved, and used after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import nn

from ..config import AwqConfig
from ..forwards.calls import Call
from ..kernels.reference import group_count
from ..layers.quant_linear import QuantLinear
from ..reporting.progress import draws_bars
from ..reporting.report import AwqReport
from ..solving.solution import LayerSolution, fake_quantized, trainable_layer
from ..survey.survey import BlockSurvey
from ..tuning.predictions import Predictions
from ..tuning.scales import Tuning, float_predictions, tune_scales, tuning_bytes
from ..undo.journal import Journal


def planned_tuning_bytes(
    surveys: Sequence[BlockSurvey], calls: Sequence[Call], batches: float, config: AwqConfig
) -> int:
    """Estimate what ``tune_scales`` holds: predictions for ``batches`` times ``calls``, and what belongs to each scale.

    As with ``objective="model"``, the activations of one block and the logits of a batch are not counted.
    """
    if not config.tune_scales:
        return 0
    weights = ((config.for_layer(name), linear.weight) for s in surveys for name, linear in s.linears.items())
    groups = sum(len(w) * group_count(w.shape[1], settings.group_size) for settings, w in weights)
    return tuning_bytes(int(batches * sum(call.tokens for call in calls)), groups)


class ScaleTuning:
    """Tuning of the scales of all layers that a quantize() call makes. Without ``tune_scales``, or logits, it does nothing.

    A model that cannot be tuned is quantized all the same, and a note in the report says why.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], config: AwqConfig, report: AwqReport, progress: bool
    ) -> None:
        self._model, self._calls, self._config, self._report = model, calls, config, report
        self._progress = progress and draws_bars()
        self._layers: dict[str, QuantLinear] = {}
        self._predictions: list[Predictions] | None = None
        if not config.tune_scales:
            return
        started = time.perf_counter()
        try:
            self._predictions = float_predictions(model, calls, self._progress)
        except Exception as error:  # whoever cannot predict tokens can be quantized
            self._note(error)
        report.tuning_seconds = time.perf_counter() - started

    @property
    def wanted(self) -> bool:
        """Whether layers will be tuned."""
        return self._predictions is not None

    def layer(self, solution: LayerSolution, built: nn.Module) -> nn.Module:
        """Take part in the making of a layer: return ``built``, or what stands for it until it is tuned."""
        return built if isinstance(built, QuantLinear) or not self.wanted else trainable_layer(solution)

    def take(self, modules: Mapping[str, nn.Module]) -> None:
        """Tune these, which are in the model, later on. Those of an earlier run count as well."""
        self._layers |= {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}

    def finish(self, surveys: Sequence[BlockSurvey], journal: Journal) -> None:
        """Tune the scales, once all layers are in the model; then put fake-quantized Linears in their places."""
        if not self.wanted:
            return
        started = time.perf_counter()
        blocks = [surveyed.block.module for surveyed in surveys]
        batches = list(zip(self._calls, self._predictions, strict=True))
        try:
            layers, passes = list(self._layers.values()), self._config.tune_scales
            self._tell(tune_scales(self._model, blocks, layers, batches, passes, self._progress))
        except Exception as error:  # a model need not have gradients to be quantized
            self._note(error)
        trained = {name: linear.weight.requires_grad for one in surveys for name, linear in one.linears.items()}
        for name, layer in self._layers.items():
            if not self._config.for_layer(name).packed:
                journal.set_module(self._model, name, fake_quantized(layer, trained[name]))
        self._report.tuning_seconds += time.perf_counter() - started

    def _tell(self, tuning: Tuning) -> None:
        moved = f"{tuning.before:.4g} -> {tuning.after:.4g} nats a token"
        kept = (
            "scales of weight groups tuned"
            if tuning.kept
            else "scales of weight groups stay as they were: tuning gained nothing"
        )
        self._report.notes.append(
            f"{kept} ({tuning.batches} batches; divergence from the float model on {tuning.held} others {moved})"
        )

    def _note(self, error: Exception) -> None:
        self._report.notes.append(f"scales of weight groups not tuned: {type(error).__name__}: {error}")
