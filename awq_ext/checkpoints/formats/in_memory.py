"""Keep of a model in memory what only awq_ext.save stores: ties, dtypes, ways to compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...layers.quant_linear import COMPUTE_DTYPES
from .packed import CheckpointError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class InMemory:
    """Where it is given, the checkpoint has the names of the model in memory, and every parameter and buffer of it.

    tied: name of a tensor -> the name under which it is stored, for tensors that have several. layers: quantized layer ->
    dtype of the Linear that it replaced, and what it computes in (``QuantLinear.compute``).
    """

    tied: Mapping[str, str]
    layers: Mapping[str, tuple[torch.dtype, str]]

    def entry(self) -> dict[str, Any]:
        """Describe it in JSON, as part of quantization_config."""
        layers = {name: [str(dtype).removeprefix("torch."), way] for name, (dtype, way) in self.layers.items()}
        return {"tied": dict(self.tied), "layers": layers}

    @classmethod
    def read(cls, entry: Any) -> InMemory:
        """Invert :meth:`entry`; CheckpointError for anything else."""
        tied, layers = (entry.get("tied"), entry.get("layers")) if isinstance(entry, dict) else (None, None)
        if not isinstance(tied, dict) or not all(isinstance(stored, str) for stored in tied.values()):
            raise CheckpointError(
                "quantization_config: in_memory.tied must be tensor name -> name of the stored tensor"
            )
        if not isinstance(layers, dict):
            raise CheckpointError("quantization_config: in_memory.layers must be name -> [dtype, compute]")
        return cls(tied, {name: _run_time(name, pair) for name, pair in layers.items()})


def _run_time(name: str, pair: Any) -> tuple[torch.dtype, str]:
    known = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
    if not known or pair[0] not in _DTYPES or pair[1] not in COMPUTE_DTYPES:
        raise CheckpointError(f"quantization_config: in_memory.layers[{name!r}] is {pair!r}, not [dtype, compute]")
    return _DTYPES[pair[0]], pair[1]
