"""Rounding of all Linears that read one input: to nearest, or with error feedback (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..config import AwqConfig
from ..layers.quantized_weight import QuantizedWeight
from ..undo import interrupt


class Quantizer:
    """Quantizer of the weights that read one input, under one scale.

    second_moment: of the input, fp32 [K, K]. scale: fp32 [K], by which columns are multiplied before rounding, or None. The moment
    is factored when GPTQ first needs it, once for all Linears.
    """

    def __init__(self, second_moment: Tensor, scale: Tensor | None = None) -> None:
        self.second_moment = second_moment
        self.scale = scale
        self._factors: dict[tuple[bool, float], tuple[Tensor, Tensor]] = {}

    def under(self, scale: Tensor | None) -> Quantizer:
        """Make a quantizer of the same input under another scale; both share the factors."""
        other = Quantizer(self.second_moment, scale)
        other._factors = self._factors
        return other

    def gptq(
        self, weight: Tensor, settings: AwqConfig, clip: Tensor | None = None, refined: bool = True
    ) -> QuantizedWeight:
        """Round ``weight`` [N, K] with error feedback, ranges shrunk by ``clip`` fp32 [N, G].

        Each channel makes up for the errors of those before it. With ``refined``, codes and scales are then refined together.
        """
        interrupt.check()
        factor, order = self._factor(settings.act_order, settings.damping)
        parts = kernels.gptq_quantize(weight, factor, order, channel_scale=self.scale, clip=clip, **settings.quantizer)
        return self._refined(weight, parts, settings, settings.refine if refined else 0)

    def nearest(
        self, weight: Tensor, settings: AwqConfig, clip: Tensor | None = None, fitted: bool = True
    ) -> QuantizedWeight:
        """Round ``weight`` to nearest. With ``fitted``, the scales of its groups are then refined while the codes stay."""
        interrupt.check()
        parts = kernels.quantize_weight(weight, channel_scale=self.scale, clip=clip, **settings.quantizer)
        # one round: a second lowers the loss by only 0.1 %, and costs another pass over the second moment
        return self._refined(weight, parts, settings, min(settings.refine, 1) if fitted else 0, scales_only=True)

    def _refined(
        self,
        weight: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        settings: AwqConfig,
        rounds: int,
        scales_only: bool = False,
    ) -> QuantizedWeight:
        if rounds:
            sizes = (settings.group_size, settings.bits, settings.damping, rounds)
            parts = kernels.refine_quantized(
                weight, *parts, self.second_moment, *sizes, channel_scale=self.scale, scales_only=scales_only
            )
        return QuantizedWeight.of_codes(*parts, settings.group_size, settings.bits)

    def damped(self, damping: float) -> Tensor:
        """Copy the second moment fp32 [K, K], with its diagonal multiplied by 1 + ``damping``."""
        moment = self.second_moment.clone()
        moment.diagonal().mul_(1 + damping)
        return moment

    def _factor(self, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
        if (act_order, damping) not in self._factors:
            diagonal = self.second_moment.diagonal()
            order = torch.arange(len(diagonal), device=diagonal.device)
            if act_order:
                # ordered before scaling: as good as ordered after it (docs/research.md), and one factor serves every scale
                order = diagonal.argsort(descending=True, stable=True)
            factor = kernels.gptq_factor(self.second_moment, order, damping)
            self._factors[act_order, damping] = factor, order
        return self._factors[act_order, damping]
