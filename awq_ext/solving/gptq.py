"""Feedback: rounding that knows a scale group's input, with error feedback (GPTQ, arXiv 2210.17323) or to nearest."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..config import AwqConfig
from ..undo import interrupt
from .codes import Codes


class Feedback:
    """The factored second moment of one group under one scale: made when first asked for, shared by the group's Linears.

    second_moment fp32 [K, K]; scale fp32 [K], by which columns are multiplied before rounding, or None.
    """

    def __init__(self, kernels: ModuleType, second_moment: Tensor, scale: Tensor | None) -> None:
        self._kernels = kernels
        self.second_moment = second_moment
        self.scale = scale
        self._factors: dict[tuple[bool, float], tuple[Tensor, Tensor]] = {}

    def under(self, scale: Tensor | None) -> Feedback:
        """The same under another scale; what is factored serves both."""
        other = Feedback(self._kernels, self.second_moment, scale)
        other._factors = self._factors
        return other

    def quantize(self, weight: Tensor, settings: AwqConfig, clip: Tensor | None = None, refined: bool = True) -> Codes:
        """Codes of ``weight`` [N, K], ranges shrunk by ``clip`` fp32 [N, G]: each channel makes up for those before it."""
        interrupt.check()
        factor, order = self._factor(settings.act_order, settings.damping)
        parts = self._kernels.gptq_quantize(
            weight, factor, order, channel_scale=self.scale, clip=clip, **settings.quantizer
        )
        return self._refined(weight, parts, settings, settings.refine if refined else 0)

    def nearest(self, weight: Tensor, settings: AwqConfig, clip: Tensor | None = None, fitted: bool = True) -> Codes:
        """Codes of ``weight`` rounded to nearest; ``fitted``: the scales of its groups then refined, the codes as they are."""
        interrupt.check()
        parts = self._kernels.quantize_weight(weight, channel_scale=self.scale, clip=clip, **settings.quantizer)
        # once: a further round lowers the loss by 0.1 %, for another pass over the second moment
        return self._refined(weight, parts, settings, min(settings.refine, 1) if fitted else 0, scales_only=True)

    def _refined(
        self,
        weight: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        settings: AwqConfig,
        rounds: int,
        scales_only: bool = False,
    ) -> Codes:
        if rounds:
            parts = self._kernels.refine_quantized(
                weight,
                *parts,
                self.second_moment,
                settings.group_size,
                settings.bits,
                settings.damping,
                rounds,
                self.scale,
                scales_only,
            )
        return Codes.store(self._kernels, parts, settings.bits)

    def damped(self, damping: float) -> Tensor:
        """The second moment that errors are measured by: fp32 [K, K], the diagonal raised by the share ``damping`` of itself."""
        moment = self.second_moment.clone()
        moment.diagonal().mul_(1 + damping)
        return moment

    def _factor(self, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
        if (act_order, damping) not in self._factors:
            diagonal = self.second_moment.diagonal()
            order = torch.arange(len(diagonal), device=diagonal.device)
            if act_order:
                # by their size before scaling: as good as after it (docs/quality.md), and one factor serves every scale
                order = diagonal.argsort(descending=True, stable=True)
            factor = self._kernels.gptq_factor(self.second_moment, order, damping)
            self._factors[act_order, damping] = factor, order
        return self._factors[act_order, damping]
