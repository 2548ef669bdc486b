"""Folding 1/s into the norm that produces a group's input, accepted only after a numeric proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Parameters by (module, name) that a rehearsal sees instead of the real ones.
Substitutes = Mapping[tuple[nn.Module, str], Tensor]

# What exact arithmetic may still differ by: products that underflow in half precision.
_EXACT = 2.0**-20


@contextmanager
def substituted(substitutes: Substitutes) -> Iterator[None]:
    """Let modules see other parameters while the body runs. The real Parameter objects are set aside, never written."""
    real = {(module, name): module._parameters[name] for module, name in substitutes}
    try:
        for (module, name), tensor in substitutes.items():
            module._parameters[name] = tensor
        yield
    finally:
        for (module, name), parameter in real.items():
            module._parameters[name] = parameter


class Probe:
    """A block's output on one calibration batch, under substituted parameters.

    rehearse: runs the block; output: what it returned with its own parameters; row_mask: the bool mask of the rows of a tensor
    that count, or None for all (``Call.row_mask``).
    """

    def __init__(
        self, rehearse: Callable[[], Any], output: Any, row_mask: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> None:
        self._rehearse = rehearse
        self._row_mask = row_mask
        self.reference = self._rows(output)

    def output(self, substitutes: Substitutes) -> list[Tensor]:
        """The floating-point tensors that the block returns."""
        with substituted(substitutes):
            return self._rows(self._rehearse())

    def _rows(self, output: Any) -> list[Tensor]:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        masks = [self._row_mask(tensor) for tensor in tensors]
        return [
            tensor if mask is None else tensor.flatten(0, -2)[mask.flatten()]
            for tensor, mask in zip(tensors, masks, strict=True)
        ]

    def distance(self, substitutes: Substitutes) -> float:
        """||output - float output||, Frobenius, over all tensors; inf where shapes differ or values are not finite."""
        total = 0.0
        for now, before in zip(self.output(substitutes), self.reference, strict=True):
            total += (
                float((now.double() - before.double()).square().sum()) if now.shape == before.shape else float("inf")
            )
        return total**0.5 if total == total else float("inf")

    @property
    def norm(self) -> float:
        """||float output||."""
        return sum(float(tensor.double().square().sum()) for tensor in self.reference) ** 0.5


@dataclass(frozen=True)
class NormFold:
    """A norm that takes over 1/s: "plain" multiplies by its weight w, "offset" by 1 + w."""

    module: nn.Module
    kind: str

    def divided(self, scale: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
        """The norm's parameters with 1/scale folded in, in their own dtype. scale fp32 [K]."""
        weight = self.module.weight.detach().float()
        new = weight / scale if self.kind == "plain" else (1 + weight) / scale - 1
        parameters = {(self.module, "weight"): new.to(self.module.weight.dtype)}
        bias = self.module._parameters.get("bias")
        if bias is not None:
            parameters[(self.module, "bias")] = (bias.detach().float() / scale).to(bias.dtype)
        return parameters

    def effective_scale(self, scale: Tensor) -> Tensor:
        """What the norm really divides by once its new weight is rounded to its dtype: the columns then compensate exactly.

        Where that is no usable number (weight 0, underflow) the wanted scale stays.
        """
        offset = 0.0 if self.kind == "plain" else 1.0
        old = self.module.weight.detach().float() + offset
        new = self.divided(scale)[self.module, "weight"].float() + offset
        effective = old / new
        # a rounded weight is off by half an ulp; more means that it left the normal range of its dtype
        usable = effective.isfinite() & ((effective / scale - 1).abs() < 0.5)
        return torch.where(usable, effective, scale)


def prove_norm_folds(
    probe: Probe, candidates: Sequence[tuple[nn.Module, Sequence[nn.Linear]]]
) -> list[NormFold | None]:
    """For each norm and the Linears that read it, the kind of fold that leaves the block's output unchanged, or None.

    All norms are first tried together as the plain kind; only if that fails, one by one.
    """
    if len(candidates) > 1:
        trials = [_Trial(NormFold(norm, "plain"), linears, seed) for seed, (norm, linears) in enumerate(candidates)]
        if _leaves_unchanged(probe, trials):
            return [trial.fold for trial in trials]
    return [prove_norm_fold(probe, norm, linears) for norm, linears in candidates]


def prove_norm_fold(probe: Probe, norm: nn.Module, linears: Sequence[nn.Linear], seed: int = 0) -> NormFold | None:
    """The kind of fold that leaves the block's output unchanged for random factors, or None.

    The factors are powers of two, so dividing the norm's weight and bias and multiplying the Linears' columns is exact in
    binary floating point: each product keeps its bits, every sum its order, and the plain kind must reproduce the output to
    2^-20. For the offset kind (1 + w)/s - 1 is rounded to w's dtype, a relative error of a few eps; it is measured against
    what the same factors do when nothing compensates them. Anything else that reads the norm's output (a residual tap,
    another branch, a router) is not compensated, which shows at once.
    """
    for kind in ("plain", "offset"):
        fold = NormFold(norm, kind)
        if _leaves_unchanged(probe, [_Trial(fold, linears, seed)]):
            return fold
    return None


class _Trial:
    """A fold under random power-of-two factors: the divided norm, the multiplied columns."""

    def __init__(self, fold: NormFold, linears: Sequence[nn.Linear], seed: int) -> None:
        weight = fold.module.weight
        generator = torch.Generator().manual_seed(seed)
        factors = (2.0 ** torch.randint(-2, 3, weight.shape, generator=generator)).to(weight.device)
        self.fold = fold
        self.divided = fold.divided(factors)
        self.columns = {(m, "weight"): m.weight.detach() * factors.to(m.weight.dtype) for m in linears}
        # see prove_norm_fold: rounding of the offset kind, relative to the uncompensated effect
        self.slack = 0.0 if fold.kind == "plain" else max(4 * torch.finfo(weight.dtype).eps, 2.0**-16)


def _leaves_unchanged(probe: Probe, trials: Sequence[_Trial]) -> bool:
    divided: dict[tuple[nn.Module, str], Tensor] = {}
    columns: dict[tuple[nn.Module, str], Tensor] = {}
    for trial in trials:
        # factors without any effect on the output would prove nothing; each norm must show its own
        if not probe.distance(trial.divided) > _EXACT * probe.norm:
            return False
        divided |= trial.divided
        columns |= trial.columns
    slack = max(trial.slack for trial in trials)
    allowed = _EXACT * probe.norm + (slack * probe.distance(divided) if slack else 0.0)
    return probe.distance(divided | columns) <= allowed
