"""Scale groups: Linears that read the very same input, and the module that produced it, as one forward shows them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..forwards.hooks import Hooks
from ..forwards.inputs import linear_input, tensor_identity


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share one input scale, and the module (by name) whose output is their input, if one was seen.

    parts: the Linears by tensor that they read; there are several with experts, each of which reads rows of its own.
    readers: parameters [., K], as (module, name), that read the producer's output too and can be multiplied by the scale.
    experts: those of the Linears that are experts. near: for the Linears of one expert, its other Linears; nothing else may be
    their producer. family: equal for such groups of all experts.
    """

    linears: tuple[str, ...]
    producer: str | None
    parts: tuple[tuple[str, ...], ...] = ()
    readers: tuple[tuple[nn.Module, str], ...] = ()
    experts: frozenset[str] = frozenset()
    near: tuple[str, ...] = ()
    family: str = ""

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The ``parts``, or all Linears as one where none were given."""
        return self.parts or (self.linears,)


class Watch:
    """Watches one forward of a block: the inputs of its Linears and the outputs of its norms, as ``tensor_identity``.

    The tensors are kept alive meanwhile, else another tensor could get the memory of a freed one and seem to be it.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[Any, ...]]] = {}
        self.outputs: dict[str, list[tuple[Any, ...]]] = {}
        self._alive: list[Tensor] = []

    def _see(self, seen: dict[str, list[tuple[Any, ...]]], name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._alive.append(value)
            # empty tensors have no address: experts that no token came to would all seem to read one tensor
            identity = tensor_identity(value) if value.numel() else ("no rows of", name)
            seen.setdefault(name, []).append(identity)

    @contextmanager
    def on(self, linears: Mapping[str, nn.Linear], producers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch a forward that the body runs."""
        with Hooks() as on:
            on.callback(self.release)
            for name, module in linears.items():
                on.input(
                    module, lambda args, kwargs, name=name: self._see(self.inputs, name, linear_input(args, kwargs))
                )
            for name, module in producers.items():
                on.output(module, partial(self._see, self.outputs, name))
            yield

    def release(self) -> None:
        """Stop keeping the tensors alive: the forward has left the block."""
        self._alive.clear()

    def groups(
        self, linears: Mapping[str, nn.Linear], kind: Callable[[str], Hashable] = lambda _: None
    ) -> list[ScaleGroup]:
        """Group Linears of one ``kind`` that were called with the same tensors, call by call; in the order of their first calls."""
        members: dict[tuple[Any, ...], list[str]] = {}
        for name, identities in self.inputs.items():
            members.setdefault((linears[name].in_features, kind(name), *identities), []).append(name)
        return [ScaleGroup(tuple(names), self.producer(key[2:])) for key, names in members.items()]

    def producer(self, identities: tuple[Any, ...]) -> str | None:
        """Find the module whose outputs had these identities, call by call."""
        for name, outputs in self.outputs.items():
            if tuple(outputs) == identities:
                return name
        return None
