"""What reaches each block behind quantized blocks, while the batches themselves go through the float ones.

Codes are learned on these inputs, to give the outputs that the float block gives on its own: so a block makes up for what those
before it have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from ..forwards.hooks import Hooks
from ..forwards.inputs import copy_inputs
from ..forwards.lockstep import Stop
from ..forwards.outputs import float_tensors

# Positional and keyword arguments of a block.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
# A batch that went on through a float block, what the block behind quantized ones is called with, and what the float one returned.
Passed = tuple[Stop, Inputs, list[Tensor]]


class QuantizedStream:
    """The outputs of the last block, for each batch twice: of the float block, and of the quantized one.

    Where a block is called with a tensor that the block before has returned, that one is exchanged. What else it is called with,
    and what a batch does between blocks, stays.
    """

    def __init__(self) -> None:
        self._returned: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the batch's number

    def inputs(self, stop: Stop) -> Inputs:
        """Return what the block that a batch waits at is called with behind quantized blocks."""
        pairs = {id(old): new for old, new in self._returned.get(stop.index, ())}
        args, kwargs = tree_map(lambda leaf: pairs.get(id(leaf), leaf), stop.inputs)
        return args, kwargs

    def advance(self, stops: Sequence[Stop]) -> list[Passed]:
        """Let the batches that wait go on through the float block."""
        return [self._advance(stop) for stop in stops if stop.waiting]

    def _advance(self, stop: Stop) -> Passed:
        inputs = copy_inputs(self.inputs(stop))
        self._returned.pop(stop.index, None)
        returned: list[Tensor] = []

        def see(output: Any) -> None:
            returned[:] = float_tensors(output)

        with Hooks() as on:
            on.output(stop.block.module, see)
            stop.advance()
        return stop, inputs, returned

    def follow(self, passed: list[Passed]) -> None:
        """Run the block, which is quantized by now, for each of these batches; what was kept for that is given back."""
        while passed:
            stop, inputs, returned = passed.pop()
            now = float_tensors(stop.run_on_copies(inputs=inputs))
            if [one.shape for one in now] == [one.shape for one in returned]:
                self._returned[stop.index] = list(zip(returned, now, strict=True))
