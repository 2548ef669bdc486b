"""Renaming: transformers 5 has some weights under other names, or joined, in memory than in files; here they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .formats import CheckpointError, PackedLinear


class Renamed:
    """A source of layers and float tensors (a QuantDir, a ModelSource) under the names of the other side.

    to_files False: a QuantDir with the names that ``model`` has; True: a ModelSource of ``model`` with those of its files.
    Quantized layers are only renamed; float tensors are joined or divided too (experts), when they are asked for.
    """

    def __init__(self, source: Any, model: nn.Module, to_files: bool = False) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self._model = model
        self._to_files = to_files
        self._renamings, self._converters = _transforms(model, to_files)
        self.layers: dict[str, str] = {}
        for name in source.layers:
            self.layers[self.name_of(name)] = name
        self._groups: dict[str, list[tuple[str, str]]] = {}  # first new name -> old names and the patterns they fit
        self._homes: dict[str, str | None] = {}  # new name -> its group, or None where it is only renamed
        self._old: dict[str, str] = {}
        self._meta: dict[str, Tensor] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        for name in source.floats:
            self._add(name)
        for group in self._groups:
            for new, tensor in self._convert(group, self._empty).items():
                self._homes[new], self._meta[new] = group, tensor
        self.floats: Iterable[str] = list(self._homes)

    def name_of(self, module: str) -> str:
        """The new name of a quantized layer, or of any Linear. CheckpointError when the model holds it joined with others."""
        new, pattern = self._renamed(f"{module}.weight")
        if pattern is not None:
            raise CheckpointError(
                f"{module} is an expert that this release of transformers holds in one tensor with the others, which has no "
                "int4 layer: load it with another release, or build the model yourself and use awq_ext.load"
            )
        return new.removesuffix(".weight")

    def layer(self, name: str) -> PackedLinear:
        """One of ``layers``."""
        return self.source.layer(self.layers[name])

    def outline(self, name: str) -> PackedLinear:
        """The same; a model's without codes."""
        return self.source.outline(self.layers[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        return tuple(self._meta[name].shape) if self._homes[name] else self.source.shape(self._old[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        return self._meta[name].dtype if self._homes[name] else self.source.dtype(self._old[name])

    def float_tensor(self, name: str) -> Tensor:
        """One of ``floats``."""
        if (group := self._homes[name]) is None:
            return self.source.float_tensor(self._old[name])
        if self._made[0] != group:
            self._made = (group, self._convert(group, self.source.float_tensor))
        return self._made[1][name]

    def _add(self, name: str) -> None:
        new, pattern = self._renamed(name)
        if pattern is None:
            self._homes[new], self._old[new] = None, name
        else:
            self._groups.setdefault(new, []).append((name, pattern))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The new name, and the pattern of the converter it takes part in. Files: renaming comes last, after conversion."""
        if not self._to_files:
            name = _apply(self._renamings, name)
        for converter in self._converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, pattern
        return (_apply(self._renamings, name) if self._to_files else name), None

    def _convert(self, group: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        members = self._groups[group]
        converter = next(c for c in self._converters if members[0][1] in c.source_patterns)
        converter = deepcopy(converter)
        for name, pattern in members:
            converter.add_tensor(group, name, pattern, read(name))
        made = converter.convert(group, model=self._model, config=self._model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {_apply(self._renamings, n): t for n, t in found.items()} if self._to_files else found

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self.source.shape(name), dtype=self.source.dtype(name), device="meta")


def _apply(renamings: Iterable[Any], name: str) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _transforms(model: nn.Module, to_files: bool) -> tuple[list[Any], list[Any]]:
    """Renamings and converters of a model's class, for this direction; none before transformers 5 and for other models."""
    if not hasattr(model, "config") or not any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        return [], []
    try:
        from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    if to_files:
        # what the model came from, if transformers loaded it; else the class's own, of which a prefix may be none of its files'
        known = getattr(model, "_weight_conversions", None)
        if known is None:
            known = [
                t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)
            ]
        found = [transform.reverse_transform() for transform in reversed(known)]
    else:
        found = get_model_conversion_mapping(model)
    return (
        [transform for transform in found if isinstance(transform, WeightRenaming)],
        [transform for transform in found if isinstance(transform, WeightConverter)],
    )
