"""What reaches each block behind quantized blocks, while the batches themselves go through the float ones.

Codes are learned on these inputs, to give the outputs that the float block gives on its own: so a block makes up for what those
before it have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..forwards.hooks import Hooks
from ..forwards.inputs import copy_inputs
from ..forwards.lockstep import Stop
from ..forwards.outputs import float_tensors
from ..forwards.probe import Probe

# Positional and keyword arguments of a block.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
# Codes are learned in blocks that return at most so many times the bytes that they take.
MOST_RETURNED = 4


@dataclass(eq=False)
class _Passed:
    """A batch that went on through a float block.

    inputs: what the block behind quantized ones is called with. returned: by the float block, the very tensors that the model
    goes on with. target: a copy of them, which the model cannot change; None where they are too large to be held.
    """

    stop: Stop
    inputs: Inputs
    returned: list[Tensor]
    target: list[Tensor] | None


class QuantizedStream:
    """The outputs of the last block, for each batch twice: of the float block, and of the quantized one.

    Where a block is called with a tensor that the block before has returned, that one is exchanged. What else it is called with,
    and what a batch does between blocks, stays.
    """

    def __init__(self) -> None:
        self._returned: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the batch's number
        self._passed: dict[int, _Passed] = {}

    def inputs(self, stop: Stop) -> Inputs:
        """Return what the block that a batch waits at is called with behind quantized blocks."""
        pairs = {id(old): new for old, new in self._returned.get(stop.index, ())}
        args, kwargs = tree_map(lambda leaf: pairs.get(id(leaf), leaf), stop.inputs)
        return args, kwargs

    def advance(self, stop: Stop, target: bool) -> None:
        """Let a batch go on through the float block. target: whether its output is held for :meth:`probes`."""
        inputs = copy_inputs(self.inputs(stop))
        self._returned.pop(stop.index, None)
        most = MOST_RETURNED * sum(one.nbytes for one in float_tensors(stop.inputs))
        passed = _Passed(stop, inputs, [], None)

        def see(output: Any) -> None:
            passed.returned = float_tensors(output)
            if target and sum(one.nbytes for one in passed.returned) <= most:
                passed.target = [one.clone() for one in passed.returned]

        with Hooks() as on:
            on.output(stop.block.module, see)
            stop.advance()
        self._passed[stop.index] = passed

    def probes(self, stops: Sequence[Stop]) -> list[Probe]:
        """Make probes of a block behind quantized ones, with the outputs that the float model has there.

        stops: all batches at its entry, of which some went on. Probes keep what a backward needs wherever their caller is in
        grad mode.
        """

        def probe(stop: Stop) -> Probe | None:
            passed = self._passed.get(stop.index)
            inputs, wanted = (
                (self.inputs(stop), stop.run_on_copies()) if passed is None else (passed.inputs, passed.target)
            )
            run = lambda: stop.run_on_copies(torch.is_grad_enabled(), inputs)  # noqa: E731
            return None if wanted is None else Probe(run, wanted, stop.call.row_mask)

        return [found for stop in stops if (found := probe(stop)) is not None]

    def follow(self) -> None:
        """Run the block, which is quantized by now, for each batch that went on; what was kept for that is given back."""
        while self._passed:
            index, passed = self._passed.popitem()
            passed.target = None
            now = float_tensors(passed.stop.run_on_copies(inputs=passed.inputs))
            if [one.shape for one in now] == [one.shape for one in passed.returned]:
                self._returned[index] = list(zip(passed.returned, now, strict=True))
