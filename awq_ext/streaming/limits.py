"""How much memory there is, how much a model takes, and what a checkpoint that is quantized from its files must be."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.formats import CheckpointError
from ..checkpoints.shards import Shards
from ..checkpoints.write import is_quantized, parse_size
from ..forwards.memory import available_bytes

# of the memory that is free when the work begins
_SHARE = 0.8


def memory_limit(max_memory: int | str | None) -> int | None:
    """Return bytes: ``max_memory`` (a number, or a text such as "12GB"), or 80 % of what is free now; None where that is unknown.

    ValueError for what is no size.
    """
    if max_memory is not None:
        try:
            return parse_size(max_memory)
        except ValueError:
            raise ValueError(
                f'max_memory={max_memory!r}: give bytes, or a number with a unit, such as "12GB"'
            ) from None
    return int(_SHARE * available_bytes()) or None


def float_bytes(folder: Path) -> int:
    """Add up the bytes of a directory's safetensors files; 0 where it has none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def float_shards(folder: Path) -> Shards:
    """Open the files of a float checkpoint. CheckpointError for quantized ones, for pickles (.bin) and for damaged files."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    if is_quantized(folder):
        raise CheckpointError(f"{folder} is quantized already: give the float model that it was made from")
    shards = Shards(folder)
    odd = [name for name in shards if shards.dtype(name).itemsize == 1 and shards.dtype(name).is_floating_point]
    if odd:
        raise CheckpointError(
            f"{folder}: {odd[0]} is {str(shards.dtype(odd[0])).removeprefix('torch.')}: float32, bfloat16 or float16 is needed"
        )
    return shards
