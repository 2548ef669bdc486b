"""Models whose weights are mapped from safetensors files: they take no memory of their own, and are read where they are used.

The mappings are private: what is written to a weight stays in memory, and no file changes. Pages that were only read are page
cache, which the system drops and reads again as it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.fill import place
from ..checkpoints.formats import CheckpointError, InMemory
from ..checkpoints.quantized_dir import CONFIG
from ..checkpoints.renaming import Renamed
from ..checkpoints.shards import Shards, first_json
from ..forwards.spill import mapped_copy
from ..integrations import transformers_models as huggingface

# Smaller tensors that must be made (cast, joined) stay in memory.
_LEAST = 1 << 20


class _FloatDir:
    """A directory of float tensors, as ``checkpoints.renaming`` reads one with quantized layers: none here."""

    layers: Mapping[str, Any] = {}
    heads: Sequence[str] = ()
    experts: Mapping[str, str] = {}
    in_memory: InMemory | None = None

    def __init__(self, shards: Shards) -> None:
        self.folder, self._shards = shards.folder, shards
        self.floats = list(shards)

    def float_tensor(self, name: str) -> Tensor:
        return self._shards.map(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shards.dtype(name)


class _OnDisk(Renamed):
    """Float tensors under the names of ``model``, all of the large ones on the disk.

    Those that have to be made (experts that transformers joins, casts) go to files in ``folder``, which vanish with them.
    dtypes: what to cast tensors to, by name; others keep theirs.
    """

    def __init__(self, shards: Shards, model: nn.Module, folder: Path, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(_FloatDir(shards), model)
        self._folder, self._dtypes = folder, dtypes

    def float_tensor(self, name: str) -> Tensor:
        """Map, or make, one of ``floats``."""
        tensor = super().float_tensor(name)
        made = self._homes.get(name) is not None or name in self._cuts
        cast = self._dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        if cast != tensor.dtype:
            tensor, made = tensor.to(cast), True
        if made and tensor.nbytes >= _LEAST:
            self._made = ("", {})  # the converter's own copies
            tensor = mapped_copy(tensor, self._folder)
        return tensor


def mapped_model(
    shards: Shards, folder: Path, dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the transformers model of a directory with its weights mapped, in eval mode: the one that ``from_pretrained`` loads.

    folder: for files that take the place of tensors which must be made. dtype: of parameters; None takes what config.json says,
    or else the files. options: of the config, such as ``trust_remote_code=True``. CheckpointError for a directory that does not
    fit together; ValueError for code beside the weights that is not trusted.
    """
    source = shards.folder
    if dtype is None and not _config_has_dtype(source):
        dtype = max(shards, key=lambda name: torch.Size(shards.shape(name)).numel())
        dtype = shards.dtype(dtype)
    model = huggingface.empty_model(source, dtype, options or {})
    dtypes = {name: one.dtype for name, one in model.named_parameters(remove_duplicate=False)}
    place(model, _OnDisk(shards, model, folder, dtypes), None, huggingface.ignored(model))
    huggingface.finish(model, source)
    return model.eval()


def _config_has_dtype(folder: Path) -> bool:
    config = first_json(folder, CONFIG) or {}
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(part.get(key) for part in parts for key in ("dtype", "torch_dtype"))


def mapped_factory(factory: Callable[[], nn.Module], shards: Shards, folder: Path) -> nn.Module:
    """Build a model of one's own with its weights mapped, in eval mode; all of them keep the dtypes of the files.

    factory: builds the model. ``torch.empty`` gives tensors without memory meanwhile, by which torch's own layers make theirs.
    CheckpointError where names, shapes or the kind of dtypes do not fit.
    """
    with huggingface.EmptyOnMeta(), torch.no_grad():
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory returned a {type(model).__name__}: a function that builds the model is needed")
    place(model, _OnDisk(shards, model, folder, {}))
    if odd := next(_without_values(model), None):
        raise CheckpointError(f"{odd} has no values: {shards.folder} does not hold it")
    return model.eval()


def _without_values(model: nn.Module) -> Iterator[str]:
    for books in (model.named_parameters(), model.named_buffers()):
        yield from (name for name, tensor in books if tensor.is_meta)
