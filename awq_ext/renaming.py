"""Renaming: transformers 5 has some weights under other names, or joined, in memory than in files; here they meet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertLinears, expert_count
from .formats import CheckpointError, PackedLinear
from .qlinear import QuantLinear
from .rows import RowNumbers, Run, cut_layer, join_layers


@dataclass
class _Member:
    """A tensor that a converter takes: its name, the pattern it fits, and what it consists of: sources with their rows.

    sources are empty for a float tensor that is converted as it is.
    """

    name: str
    pattern: str
    sources: dict[str, int] = field(default_factory=dict)
    stacked: bool = False


class Renamed:
    """A source of layers and float tensors (a QuantDir, a ModelSource) under the names of the other side.

    to_files False: a QuantDir with the names that ``model`` has; True: a ModelSource of ``model`` with those of its files.
    Where one side holds the weights of several layers as one (experts), quantized layers are joined or cut by rows; which rows
    go where, transformers' own converters show on row numbers. Float tensors go through the converters themselves, when they
    are asked for. ``fused``: parameters of ``model`` to be taken apart before it can hold ``layers``, and how they are used.
    CheckpointError for quantized layers that cannot be cut or joined this way, and for missing experts.
    """

    def __init__(self, source: Any, model: nn.Module, to_files: bool = False) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self._model = model
        self._to_files = to_files
        self._renamings, self._converters = _transforms(model, to_files)
        self.layers: dict[str, tuple[Run, ...]] = {}
        self.fused: dict[str, str] = {}
        self._cuts: dict[str, tuple[Run, ...]] = {}  # float weights made of rows, by new name
        self._groups: dict[str, list[_Member]] = {}  # by first new name
        self._homes: dict[str, str | None] = {}  # new name -> its group, or None where it is only renamed
        self._old: dict[str, str] = {}
        self._meta: dict[str, Tensor] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._read: tuple[str, PackedLinear | None] = ("", None)
        self._apart: set[str] = set()
        if to_files:
            self._add_experts()
        for name in source.layers:
            if name not in self._apart:
                self._add_layer(name)
        for name in source.floats:
            if name not in self._apart:
                self._add_float(name)
        for group, members in self._groups.items():
            # files list expert 10 before expert 2, and converters join in the order they are given
            members.sort(key=lambda member: _natural(member.name))
            self._resolve(group, members)
        self.floats: Iterable[str] = [*self._homes, *self._cuts]

    def linears(self, modules: Iterable[str]) -> list[str]:
        """The new names of these float Linears; those that float experts have one by one are added."""
        found = []
        for module in modules:
            new, pattern = self._renamed(f"{module}.weight")
            if pattern is None:
                found.append(new)
        joined = [name for name, group in self._homes.items() if group is not None]
        found += [n for n in (*joined, *self._cuts) if n.endswith(".weight") and len(self.shape(n)) == 2]
        return [name.removesuffix(".weight") for name in dict.fromkeys(found)]

    def layer(self, name: str) -> PackedLinear:
        """One of ``layers``."""
        return self._assemble(name, self.source.layer)

    def outline(self, name: str) -> PackedLinear:
        """The same; a model's without codes."""
        return self._assemble(name, self.source.outline)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        if name in self._cuts:
            runs = self._cuts[name]
            return (sum(run.stop - run.start for run in runs), *self.source.shape(runs[0].source)[1:])
        return tuple(self._meta[name].shape) if self._homes[name] else self.source.shape(self._old[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        if name in self._cuts:
            return self.source.dtype(self._cuts[name][0].source)
        return self._meta[name].dtype if self._homes[name] else self.source.dtype(self._old[name])

    def float_tensor(self, name: str) -> Tensor:
        """One of ``floats``."""
        if name in self._cuts:
            return torch.cat([self.source.float_tensor(r.source)[r.start : r.stop] for r in self._cuts[name]])
        if (group := self._homes[name]) is None:
            return self.source.float_tensor(self._old[name])
        if self._made[0] != group:
            self._made = (group, self._convert(group, lambda member: self.source.float_tensor(member.name)))
        return self._made[1][name]

    def _assemble(self, name: str, read: Callable[[str], PackedLinear]) -> PackedLinear:
        runs = self.layers[name]
        parts = []
        for run in runs:
            key = f"{read.__name__} {run.source}"
            if self._read[0] != key:  # cut in two it would be read twice
                self._read = (key, read(run.source))
            parts.append(cut_layer(self._read[1], run))
        return join_layers(parts, [run.source for run in runs])

    def _add_experts(self) -> None:
        """Experts that quantize() took apart: transformers' converters know them by the name of what they were one of."""
        for name, experts in self._model.named_modules():
            if not isinstance(experts, ExpertLinears):
                continue
            first, pattern = self._renamed(name)
            if pattern is None or experts.use != "linear":
                raise CheckpointError(
                    f"the experts in {name} are int4 layers one by one, but files of this model hold them as one tensor"
                    f"{'' if pattern is None else ' of another orientation'}, which no layout has: write the model with "
                    "awq_ext.save, or leave them float with skip="
                )
            sources = {}
            for e, expert in enumerate(experts.children()):
                source = f"{name}.{e}" if isinstance(expert, QuantLinear) else f"{name}.{e}.weight"
                sources[source] = expert.out_features
            self._apart |= set(sources)
            self._groups.setdefault(first, []).append(_Member(name, pattern, sources, stacked=True))

    def _add_layer(self, name: str) -> None:
        new, pattern = self._renamed(f"{name}.weight")
        if pattern is None:
            self.layers[new.removesuffix(".weight")] = (Run(name),)
        else:
            member = _Member(f"{name}.weight", pattern, {name: self.source.rows(name)})
            self._groups.setdefault(new, []).append(member)

    def _add_float(self, name: str) -> None:
        new, pattern = self._renamed(name)
        if pattern is None:
            self._homes[new], self._old[new] = None, name
        else:
            self._groups.setdefault(new, []).append(_Member(name, pattern))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The new name, and the pattern of the converter it takes part in. Files: renaming comes last, after conversion."""
        if not self._to_files:
            name = _apply(self._renamings, name)
        for converter in self._converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, pattern
        return (_apply(self._renamings, name) if self._to_files else name), None

    def _resolve(self, group: str, members: list[_Member]) -> None:
        """Find what the converter makes of one group."""
        if not self._to_files and (absent := _absent(members)):
            raise CheckpointError(f"{self.folder} lacks {absent[0]}: {group} is made of all of them")
        if any(member.sources for member in members):
            self._resolve_rows(group, members)
            return
        try:
            made = self._convert(group, self._empty)
        except Exception as error:  # transformers' own code, on what may be anything
            raise CheckpointError(self._failure(group, members, error)) from error
        for new, tensor in made.items():
            self._homes[new], self._meta[new] = group, tensor

    def _resolve_rows(self, group: str, members: list[_Member]) -> None:
        for member in members:
            if not member.sources:
                member.sources = {member.name: self.source.shape(member.name)[0]}
        numbers = RowNumbers({source: rows for member in members for source, rows in member.sources.items()})

        def read(member: _Member) -> Tensor:
            tensors = [numbers.of(source) for source in member.sources]
            return torch.stack(tensors) if member.stacked else tensors[0]

        try:
            made = self._convert(group, read)
        except Exception as error:  # transformers' own code, on what may be anything
            raise CheckpointError(self._failure(group, members, error)) from error
        for new in sorted(made, key=_natural):
            for name, weight in self._weights(new, made[new], members).items():
                self._put(name, numbers.runs(weight), members)

    def _weights(self, new: str, made: Tensor, members: list[_Member]) -> dict[str, Tensor]:
        """Linears and their weights in what a converter made; experts in one tensor are as many Linears."""
        if made.dim() == 2 and new.endswith(".weight"):
            return {new.removesuffix(".weight"): made}
        if made.dim() != 3 or self._to_files:
            raise CheckpointError(
                f"{members[0].name} is quantized, but would become {new} of {made.dim()} dimensions, which is no Linear"
            )
        count = expert_count(self._model, new)
        if count is not None and count != len(made):
            absent = _absent(members, count)
            what = f"lacks {absent[0]}" if absent else "does not fit"
            raise CheckpointError(f"{self.folder} {what}: {new} has {count} experts in the model, {len(made)} there")
        self.fused[new] = "linear"
        return {f"{new}.{e}": weight for e, weight in enumerate(made)}

    def _put(self, name: str, runs: tuple[Run, ...] | None, members: list[_Member]) -> None:
        if runs is None:
            raise CheckpointError(
                f"{members[0].name} is quantized, and {name} is not made of its rows, so that its groups cannot be kept"
                + (": write the model with awq_ext.save" if self._to_files else "")
            )
        quantized = [run.source for run in runs if run.source in self.source.layers]
        if not quantized:
            self._cuts[f"{name}.weight"] = runs
        elif len(quantized) == len(runs):
            self.layers[name] = runs
        else:
            left = next(run.source for run in runs if run.source not in self.source.layers)
            raise CheckpointError(
                f"{quantized[0]} is quantized, {left} is not, and the model holds both as one layer: {name}"
            )

    def _failure(self, group: str, members: list[_Member], error: Exception) -> str:
        fitted = {member.pattern for member in members}
        absent = [pattern for pattern in self._converter(members).source_patterns if pattern not in fitted]
        found = f"{', '.join(sorted(fitted))} of {members[0].name.partition('.experts.')[0]}"
        more = f"; nothing is called {', '.join(absent)}" if absent else ""
        return f"transformers cannot convert {found} ({group}): {error}{more}"

    def _converter(self, members: list[_Member]) -> Any:
        return next(c for c in self._converters if members[0].pattern in c.source_patterns)

    def _convert(self, group: str, read: Callable[[_Member], Tensor]) -> dict[str, Tensor]:
        members = self._groups[group]
        converter = deepcopy(self._converter(members))
        for member in members:
            converter.add_tensor(group, member.name, member.pattern, read(member))
        made = converter.convert(group, model=self._model, config=self._model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {_apply(self._renamings, n): t for n, t in found.items()} if self._to_files else found

    def _empty(self, member: _Member) -> Tensor:
        return torch.empty(self.source.shape(member.name), dtype=self.source.dtype(member.name), device="meta")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 2 comes before expert 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _absent(members: Iterable[_Member], count: int = 0) -> list[str]:
    """Names of the experts that are missing among ``members``, of 0 to the highest number there, or of ``count``."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for member in members:
        pattern = re.sub(r"\\?\*\\?\.", r"(\\d+)\\.", member.pattern, count=1)
        if "*" in member.pattern and (match := re.search(pattern, member.name)) and match.lastindex == 1:
            around = (member.pattern, member.name[: match.start(1)], member.name[match.end(1) :])
            found.setdefault(around, set()).add(int(match[1]))
    count = max([count, *(number + 1 for numbers in found.values() for number in numbers)], default=0)
    return [f"{a}{e}{b}" for (_, a, b), numbers in found.items() for e in range(count) if e not in numbers]


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
