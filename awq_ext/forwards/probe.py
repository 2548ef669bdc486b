"""Probes: a block's output on one calibration batch under other parameters, without touching the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hooks
from .inputs import linear_input
from .outputs import distance_of, equal, float_tensors, norm_of
from .recall import Recall

# Parameters, by (module, name), that a block sees on trial instead of the real ones.
Substitutes = Mapping[tuple[nn.Module, str], Tensor]


@contextmanager
def substituted(substitutes: Substitutes) -> Iterator[None]:
    """Let modules see other parameters while the body runs; the real Parameter objects are set aside, never written."""
    real = {(module, name): module._parameters[name] for module, name in substitutes}
    try:
        for (module, name), tensor in substitutes.items():
            module._parameters[name] = tensor
        yield
    finally:
        for (module, name), parameter in real.items():
            module._parameters[name] = parameter


class Probe:
    """Runs a block on one calibration batch under substituted parameters.

    run: runs the block on copies of its arguments. output: what it returned with its own parameters. row_mask: finds the rows of
    a tensor that count, as ``Call.row_mask`` does. recall: spares products where nothing changed; that of the run that made
    ``output`` may hold them already.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        output: Any,
        row_mask: Callable[[Tensor], Tensor | None] = lambda _: None,
        recall: Recall | None = None,
    ) -> None:
        self._run = run
        self._row_mask = row_mask
        self._recall = Recall([]) if recall is None else recall
        self.reference = self._rows(output)
        self._changed: set[int] = set()  # places in ``reference``

    def output(self, substitutes: Substitutes) -> list[Tensor]:
        """Return the floating-point tensors that the block returns, without the rows that do not count."""
        return self.watch(substitutes, [])[0]

    def inputs(self, linears: Sequence[nn.Linear], substitutes: Substitutes) -> list[Tensor]:
        """Return what each of ``linears`` is first called with, [rows, in_features], without the rows that do not count.

        For a Linear that is not called this is [0, in_features].
        """
        return self.watch(substitutes, linears)[1]

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Spare runs in the body the products in which nothing has changed since the run that is kept: if none is, the first."""
        if not self._recall.kept:
            self._recall.begin()
        try:
            yield
        finally:
            self._recall.end()

    def watch(self, substitutes: Substitutes, linears: Sequence[nn.Linear]) -> tuple[list[Tensor], list[Tensor]]:
        """Return both :meth:`output` and :meth:`inputs`, of one run."""
        seen: dict[nn.Linear, Tensor] = {}

        def see(linear: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = linear_input(args, kwargs)
            seen.setdefault(linear, self._counted(x).reshape(-1, x.shape[-1]))

        with Hooks() as on, substituted(substitutes), self._recall.used():
            for linear in linears:
                on.input(linear, partial(see, linear))
            output = self._rows(self._run())
        return output, [seen.get(linear, torch.empty(0, linear.in_features)) for linear in linears]

    def _counted(self, tensor: Tensor) -> Tensor:
        mask = self._row_mask(tensor) if tensor.dim() > 1 else None
        return tensor if mask is None else tensor.flatten(0, -2)[mask.flatten()]

    def _rows(self, output: Any) -> list[Tensor]:
        return [self._counted(tensor) for tensor in float_tensors(output)]

    def distance(self, substitutes: Substitutes) -> float:
        """Return ||output - float output||, Frobenius, over all tensors; inf where shapes differ or values are not finite."""
        output = self.output(substitutes)
        distance = distance_of(output, self.reference)
        pairs = enumerate(zip(output, self.reference, strict=False))
        self._changed |= {i for i, pair in pairs if i not in self._changed and not equal(*pair)}
        return distance

    @property
    def norm(self) -> float:
        """||float output||, Frobenius, of those of its tensors that :meth:`distance` has seen change.

        What the block only passes on, such as a mask of large negative numbers, would hide the errors of the rest.
        """
        return norm_of([self.reference[i] for i in sorted(self._changed)])


@contextmanager
def output_dtypes(modules: Sequence[nn.Module]) -> Iterator[set[torch.dtype]]:
    """Collect the floating-point dtypes that ``modules`` return while the body runs."""
    seen: set[torch.dtype] = set()

    with Hooks() as on:
        for module in modules:
            on.output(module, lambda output: seen.add(output.dtype) if output.dtype.is_floating_point else None)
        yield seen


def combined(
    changes: Sequence[tuple[nn.Module, str, Callable[[Tensor], Tensor]]],
) -> dict[tuple[nn.Module, str], Tensor]:
    """Make substitutes from changes of parameters.

    Those of one parameter are applied one after another in fp32; the result has its dtype.
    """
    by_parameter: dict[tuple[nn.Module, str], list[Callable[[Tensor], Tensor]]] = {}
    for module, name, change in changes:
        by_parameter.setdefault((module, name), []).append(change)
    # one after another: a block in fp32 would take twice what its weights do
    return {(module, name): _changed(module._parameters[name], those) for (module, name), those in by_parameter.items()}


def _changed(parameter: Tensor, changes: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    value = parameter.detach().float()
    for change in changes:
        value = change(value)
    return value.to(parameter.dtype)
