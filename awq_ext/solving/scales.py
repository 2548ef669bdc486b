"""The search for a scale group's input scale, from second moments alone (AWQ, arXiv 2306.00978, equation 4, rewritten).

No activation and no forward is needed: with G = X^T X the squared output error of a Linear is tr(E G E^T), whatever the
number of calibration rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..config import AwqConfig
from ..kernels import reference
from ..undo import interrupt

_NUMBERS_AT_ONCE = 1 << 17  # of a weight, 512 KiB in fp32: they stay in the cache
_SMALLEST_SCALE = 1e-4
_FEWEST_ROWS = 64
# Every third alpha is tried first, then those on either side of the best two, up to the next that was tried. On 40 groups of
# SmolLM2 that chose what the best four had chosen. Looking around the single best only missed the best of all alphas in one group
# of six of two Llamas, because each of the two families has a minimum of its own.
_STRIDE = 3
_PROMISING = 2
# Powers of the chosen scale that are tried with error feedback. Scales are chosen for rounding to nearest. Feedback makes up for
# part of the error that they prevent, but not for what they cost the other channels of a weight group (docs/research.md).
STRENGTHS = (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class ScaleChoice:
    """The scale s of a group, fp32 [K] (None: the identity), its family (``kind``) and alpha, and the power it was raised to."""

    scale: Tensor | None
    kind: str = "identity"
    alpha: float | None = None
    power: float = 1.0

    def weakened(self, power: float) -> ScaleChoice:
        """Raise s to ``power``."""
        return self if self.scale is None else replace(self, scale=self.scale**power, power=power)


def weight_mean(weights: Sequence[Tensor], group_sizes: Sequence[int]) -> Tensor:
    """Compute w_mean fp32 [K]: the mean over all rows of |W[:, k]| / (largest |W| of its weight group)."""
    k, tiny = weights[0].shape[1], torch.finfo(torch.float32).tiny
    total = torch.zeros(k, dtype=torch.float64, device=weights[0].device)
    for weight, group_size in zip(weights, group_sizes, strict=True):
        g = reference.group_length(k, group_size)
        for rows in weight.split(max(1, _NUMBERS_AT_ONCE // k)):
            magnitude = rows.float().abs_() if rows.dtype != torch.float32 else rows.abs()
            for part in magnitude.split(k // g * g, dim=1):  # the whole groups, and a short last one
                groups = part.unflatten(1, (-1, min(g, part.shape[1])))
                groups.div_(groups.amax(-1, keepdim=True).clamp_min_(tiny))
            total += magnitude.sum(0, dtype=torch.float64)
    return (total / sum(len(weight) for weight in weights)).float()


def candidate_scales(x_mean: Tensor, w_mean: Tensor, n_grid: int) -> tuple[Tensor, list[ScaleChoice]]:
    """List all scales to try: fp32 [C, K], and their labels (``scale`` unset). The identity comes first.

    plain: s = x_mean^alpha; duo: s = x_mean^alpha / (w_mean^(1 - alpha) + 1e-4); alpha on a grid of n_grid steps in [0, 1].
    Each is clamped to >= 1e-4 and divided by sqrt(max s * min s); dead channels (x_mean = 0) and non-finite values get 1.
    """
    rows, labels = [torch.ones_like(x_mean)], [ScaleChoice(None)]
    for step in range(n_grid + 1):
        alpha = step / n_grid
        plain = x_mean**alpha
        families = {"plain": plain, "duo": plain / (w_mean ** (1 - alpha) + _SMALLEST_SCALE)}
        for kind, scale in families.items():
            if kind == "plain" and step == 0:
                continue  # x_mean^0 is the identity
            rows.append(scale)
            labels.append(ScaleChoice(None, kind, alpha))
    return _normalized(torch.stack(rows), x_mean > 0), labels


def _normalized(scales: Tensor, alive: Tensor) -> Tensor:
    scales = scales.clamp_min(_SMALLEST_SCALE)
    live = alive & scales.isfinite()
    largest = scales.masked_fill(~live, -torch.inf).amax(1, keepdim=True)
    smallest = scales.masked_fill(~live, torch.inf).amin(1, keepdim=True)
    scales = scales / (largest * smallest).sqrt()  # NaN where nothing is alive
    return torch.where(alive & scales.isfinite() & (scales > 0), scales, 1.0)


def search_scale(
    weights: Sequence[Tensor],
    x_mean: Tensor,
    second_moments: Sequence[Tensor],
    settings: Sequence[AwqConfig],
    tie: Callable[[Tensor], Tensor] | None = None,
    alone: bool = False,
) -> ScaleChoice:
    """Find the scale with the least output error, summed over the group's Linears, that makes none of them worse than RTN.

    weights: each [N_i, K], with the second moment fp32 [K, K] of its input and the settings it will be rounded with; x_mean fp32
    [K]. Candidates are ranked on evenly spaced rows (``ranking_rows``).
    tie: turns candidates [C, K] into the nearest ones that can be folded. alone: a Linear that a candidate makes worse than RTN
    will do without it, so its loss then counts as RTN's.
    """
    interrupt.check()
    group_sizes = [config.group_size for config in settings]
    candidates, labels = candidate_scales(x_mean, weight_mean(weights, group_sizes), settings[0].n_grid)
    if tie is not None:
        candidates = tie(candidates)
    totals = torch.full((len(candidates),), torch.inf, dtype=torch.float64, device=candidates.device)
    first = _spaced(len(candidates))
    losses = _ranking_losses(weights, candidates[first], second_moments, settings)
    rtn = losses[:, :1]
    totals[first] = _total(losses, rtn, alone)
    if more := [i for i in _around(totals) if i not in first]:
        totals[more] = _total(_ranking_losses(weights, candidates[more], second_moments, settings), rtn, alone)
    best = int(totals.argmin())
    if best == 0:
        return ScaleChoice(None)
    return ScaleChoice(candidates[best].clone(), labels[best].kind, labels[best].alpha)


def _ranking_losses(
    weights: Sequence[Tensor],
    candidates: Tensor,
    second_moments: Sequence[Tensor],
    settings: Sequence[AwqConfig],
) -> Tensor:
    """Estimate on evenly spaced rows what each Linear loses under each candidate [C, K]: fp64 [Linears, C]."""
    losses = []
    counts = rows_to_judge_by(weights, settings[0].search_rows)
    for weight, second_moment, config, rows in zip(weights, second_moments, settings, counts, strict=True):
        sampled = kernels.scale_losses(weight, candidates, second_moment, max_rows=rows, **config.quantizer)
        losses.append(sampled * (len(weight) / rows))
    return torch.stack(losses)


def _total(losses: Tensor, rtn: Tensor, alone: bool) -> Tensor:
    """Sum losses [Linears, C] over the Linears: fp64 [C].

    Where a Linear loses more than by ``rtn`` [Linears, 1] the sum is inf, or with ``alone`` counts RTN's loss instead.
    """
    if alone:
        return losses.minimum(rtn).sum(0)
    return losses.sum(0).masked_fill((losses > rtn).any(0), torch.inf)


def _spaced(count: int) -> list[int]:
    """List the candidates to try first: 0 (the identity) and, as 2 * step + family, every third step down from the last."""
    last = count // 2 - 1
    return [0, *(i for i in range(1, count) if (last - i // 2) % _STRIDE == 0)]


def _around(totals: Tensor) -> list[int]:
    """List the candidates of the same family on either side of the best ones, up to the next that was tried."""
    best = totals.argsort(stable=True)[:_PROMISING].tolist()
    steps = [2 * step for step in range(1 - _STRIDE, _STRIDE)]
    return sorted({i + step for i in best for step in steps if 0 <= i + step < len(totals)})


def rows_to_judge_by(weights: Sequence[Tensor], search_rows: int) -> list[int]:
    """Share out the rows to rank on among a group's Linears in proportion to their rows, at least ``_FEWEST_ROWS`` each."""
    wanted = ranking_rows(search_rows, weights[0].shape[1])
    total = sum(len(weight) for weight in weights)
    return [min(len(w), max(_FEWEST_ROWS, wanted * len(w) // total)) if wanted else len(w) for w in weights]


def ranking_rows(search_rows: int, in_features: int) -> int:
    """Count the output rows of a group to rank on: ``search_rows`` up to 2048 channels, fewer in proportion beyond; 0: all.

    A row's loss adds up one rounding error per channel, so the sampling noise of the mean falls with rows * channels.
    """
    return max(1, search_rows * min(2048, in_features) // in_features) if search_rows else 0
