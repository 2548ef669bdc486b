"""What Linears returned in one run of a block, so that another run need not multiply where nothing has changed.

A trial of a fold or of a clip changes the parameters of few Linears. The others often get the very input that they had before:
those in front of the changed ones, and all behind a fold, which leaves the values as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .inputs import linear_input

P = ParamSpec("P")
T = TypeVar("T")
# The most bytes of inputs and outputs that are kept: those of 2048 tokens of a block of a 3B model in 16 bits.
MOST_KEPT = 128 << 20


@dataclass(frozen=True)
class _Kept:
    """A tensor as it was: in-place operations, of the model's code too, count up its version."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        return cls(tensor, tensor._version)

    @property
    def unchanged(self) -> bool:
        return self.tensor._version == self.version


@dataclass(frozen=True)
class _Product:
    """One call of a Linear: what it multiplied, under which autocast, and what it returned."""

    weight: _Kept
    bias: _Kept | None
    autocast: torch.dtype | None
    x: _Kept
    output: _Kept

    def answers(self, linear: nn.Linear, x: Tensor, autocast: torch.dtype | None) -> bool:
        """Tell whether ``linear`` would return the same for ``x`` as it is now."""
        bias = None if self.bias is None else self.bias.tensor
        same = linear.weight is self.weight.tensor and linear.bias is bias and autocast == self.autocast
        kept = (
            (self.weight, self.x, self.output) if self.bias is None else (self.weight, self.bias, self.x, self.output)
        )
        fresh = same and all(one.unchanged for one in kept)
        return fresh and x.dtype == self.x.tensor.dtype and torch.equal(x, self.x.tensor)


class Recall:
    """The calls of some Linears in the first run after :meth:`begin`, up to :meth:`end`.

    Of Linears whose forward is not ``nn.Linear``'s own, nothing is kept.
    """

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        self._linears = [one for one in linears if type(one).forward is nn.Linear.forward]
        self._products: dict[nn.Linear, list[_Product]] | None = {}

    @property
    def kept(self) -> bool:
        """Whether a run is kept."""
        return bool(self._products)

    def begin(self) -> None:
        """Let the next run be kept."""
        self._products = None

    def keep(self, run: Callable[P, T]) -> Callable[P, T]:
        """Make a function that does what ``run`` does and keeps the calls in it."""

        def kept(*args: P.args, **kwargs: P.kwargs) -> T:
            self.begin()
            with self.used():
                return run(*args, **kwargs)

        return kept

    def end(self) -> None:
        """Let go of all tensors."""
        self._products = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Answer the calls in the body, a run, from what is kept; or keep them, if it is the first."""
        known = self._products
        if known == {}:
            yield
            return
        made: dict[nn.Linear, list[_Product]] = {}
        with ExitStack() as stack:
            for linear in self._linears:
                if "forward" not in vars(linear):
                    stack.callback(delattr, linear, "forward")
                    linear.forward = partial(self._answer, linear, known or {}, made if known is None else None)
            yield
        if known is None:
            self._products = made

    def _answer(
        self,
        linear: nn.Linear,
        known: dict[nn.Linear, list[_Product]],
        made: dict[nn.Linear, list[_Product]] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x = linear_input(args, kwargs)
        if torch.is_grad_enabled() or x.is_inference() or linear.weight.is_inference():  # without a version
            return nn.Linear.forward(linear, x)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        product = next((one for one in known.get(linear, ()) if one.answers(linear, x, autocast)), None)
        if product is None:
            output = nn.Linear.forward(linear, x)
            if made is None or output.is_inference():
                return output
            bias = None if linear.bias is None else _Kept.of(linear.bias)
            product = _Product(_Kept.of(linear.weight), bias, autocast, _Kept.of(x), _Kept.of(output))
        if made is not None and _bytes([one for calls in made.values() for one in calls] + [product]) <= MOST_KEPT:
            made.setdefault(linear, []).append(product)
        return product.output.tensor


def _bytes(products: list[_Product]) -> int:
    """Count what is kept; an input that several Linears read, once."""
    tensors = {id(kept.tensor): kept.tensor for one in products for kept in (one.x, one.output)}
    return sum(tensor.nbytes for tensor in tensors.values())
