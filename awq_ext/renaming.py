"""Renaming: transformers 5 has some weights under other names, or joined, in memory than in files; here they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertLinears
from .formats import CheckpointError, PackedLinear
from .qlinear import QuantLinear
from .rows import Numbered, take


@dataclass
class _Joined:
    """Quantized layers that stand for one weight. use: of the parameter that they were, "" for an ordinary layer."""

    name: str
    layers: list[str]
    use: str = ""
    pattern: str = ""

    def numbers(self, numbered: Numbered) -> Tensor:
        """In place of the weight: [E, N, 1] for experts, [N, 1] for one layer."""
        each = [numbered.numbers(name) for name in self.layers]
        return torch.stack(each) if self.use else each[0]


class Renamed:
    """A source of layers and float tensors (a QuantDir, a ModelSource) under the names of the other side.

    to_files False: a QuantDir with the names that ``model`` has; True: a ModelSource of ``model`` with those of its files.
    Tensors and layers that the model joins (experts) are joined or divided when they are asked for, layers by rows.
    """

    def __init__(self, source: Any, model: nn.Module, to_files: bool = False) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self._model = model
        self._to_files = to_files
        self._renamings, self._converters = _transforms(model, to_files)
        # parameters whose experts are layers of their own -> how the model uses them
        self.experts: dict[str, str] = dict(getattr(source, "experts", {}))
        self.layers: dict[str, str] = {}  # name -> the source's, one of them where a layer is made of several
        self._rows: dict[str, list[tuple[str, Tensor]]] = {}  # name -> layers of the source and their rows
        self._add_layers()
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
        """The new name of a Linear that is not joined with others."""
        return self._renamed(f"{module}.weight")[0].removesuffix(".weight")

    def layer(self, name: str) -> PackedLinear:
        """One of ``layers``."""
        return self._read(name, self.source.layer)

    def outline(self, name: str) -> PackedLinear:
        """The same; a model's without codes."""
        return self._read(name, self.source.outline)

    def _read(self, name: str, read: Callable[[str], PackedLinear]) -> PackedLinear:
        return take(self._rows[name], read) if name in self._rows else read(self.layers[name])

    def _add_layers(self) -> None:
        """Fill ``layers``: renamed, or made of the rows of others where the model joins experts."""
        groups: dict[str, list[_Joined]] = {}  # by the first name of what they become
        for joined in self._joined():
            new, pattern = self._renamed(joined.name)
            if pattern is not None and joined.use in ("", "linear"):
                joined.pattern = pattern
                groups.setdefault(new, []).append(joined)
            else:
                self._keep(joined)
        for group, members in groups.items():
            numbered = Numbered({name: self.source.rows(name) for joined in members for name in joined.layers})
            stand_ins = {joined.name: joined.numbers(numbered) for joined in members}
            made = self._convert(group, stand_ins.__getitem__, [(joined.name, joined.pattern) for joined in members])
            try:
                found = {
                    new: [numbered.parts(rows) for rows in (t[None] if self._to_files else t)]
                    for new, t in made.items()
                }
            except CheckpointError as error:
                if not self._to_files:
                    raise CheckpointError(f"{members[0].layers[0]}: {error}") from None
                for joined in members:
                    self._keep(joined)
                continue
            for new, parts in found.items():
                if not self._to_files:
                    self.experts[new] = "linear"
                names = [new.removesuffix(".weight")] if self._to_files else [f"{new}.{e}" for e in range(len(parts))]
                self._rows |= dict(zip(names, parts, strict=True))
                self.layers |= {name: self._rows[name][0][0] for name in names}

    def _keep(self, joined: _Joined) -> None:
        """Layers that are only renamed: also experts that no file knows apart."""
        self.layers |= {self.name_of(name): name for name in joined.layers}
        if joined.use:
            self.experts[joined.name] = joined.use

    def _joined(self) -> list[_Joined]:
        """What stands for one weight in conversions: all experts of a parameter in a model, a single layer otherwise."""
        found: dict[str, _Joined] = {}
        for name in self.source.layers:
            parent = name.rpartition(".")[0]
            experts = self._model.get_submodule(parent) if self._to_files else None
            if not isinstance(experts, ExpertLinears):
                found[f"{name}.weight"] = _Joined(f"{name}.weight", [name])
                continue
            found.setdefault(parent, _Joined(parent, [], experts.use)).layers.append(name)
            if not all(isinstance(expert, QuantLinear) for expert in experts.children()):
                raise CheckpointError(f"some experts of {parent} are float, others not: no file can hold both")
        return list(found.values())

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

    def _convert(
        self, group: str, read: Callable[[str], Tensor], members: Sequence[tuple[str, str]] | None = None
    ) -> dict[str, Tensor]:
        members = members or self._groups[group]
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
