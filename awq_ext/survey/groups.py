"""Scale groups: which Linears read the very same input, and which module produced it. Found by watching one forward."""

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

    parts: the Linears that read the very same tensor, together; several for experts, each of which reads rows of its own.
    readers: parameters [., K], as (module, name), that read the producer's output too and can be multiplied by the scale.
    experts: those of the Linears that are experts. near: for Linears of one expert, the others of it, which alone may be its
    producers; family: equal for such groups of all experts.
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
        """``parts``, of which there is one if nothing else is said."""
        return self.parts or (self.linears,)


class Watch:
    """What one forward of a block shows: the inputs of its Linears, the outputs of its norms, as identities.

    The tensors are kept alive while watching, else a freed one's memory could be taken for it by another.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[Any, ...]]] = {}
        self.outputs: dict[str, list[tuple[Any, ...]]] = {}
        self._alive: list[Tensor] = []

    def _see(self, seen: dict[str, list[tuple[Any, ...]]], name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._alive.append(value)
            # empty ones lie nowhere: experts that no token came to would all seem to read one tensor
            identity = tensor_identity(value) if value.numel() else ("no rows of", name)
            seen.setdefault(name, []).append(identity)

    @contextmanager
    def on(self, linears: Mapping[str, nn.Linear], producers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch while the body runs a forward."""
        with Hooks() as on:
            on.callback(self.release)
            for name, module in linears.items():
                on.input(module, partial(self._called, name))
            for name, module in producers.items():
                on.output(module, partial(self._see, self.outputs, name))
            yield

    def _called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(self.inputs, name, linear_input(args, kwargs))

    def release(self) -> None:
        """Let go of the tensors: the forward has left the block."""
        self._alive.clear()

    def groups(
        self, linears: Mapping[str, nn.Linear], kind: Callable[[str], Hashable] = lambda _: None
    ) -> list[ScaleGroup]:
        """Linears of one ``kind`` called with the same tensors, call by call, in the order they were first called."""
        members: dict[tuple[Any, ...], list[str]] = {}
        for name, identities in self.inputs.items():
            members.setdefault((linears[name].in_features, kind(name), *identities), []).append(name)
        return [ScaleGroup(tuple(names), self.producer(key[2:])) for key, names in members.items()]

    def producer(self, identities: tuple[Any, ...]) -> str | None:
        """The module whose outputs had these identities, call by call."""
        for name, outputs in self.outputs.items():
            if tuple(outputs) == identities:
                return name
        return None
