"""Renaming: transformers 5 has some weights under other names, or joined, in memory than in files; here they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import QuantLinear
from ..standins.expert_linears import ExpertLinears, expert_count
from .conversions import weight_conversions
from .formats import CheckpointError, PackedLinear
from .joined import Member, RowNumbers, Run, absent_experts, cut_layer, join_layers, natural_order


class Renamed:
    """A source of layers and float tensors (a QuantDir, a ModelSource) under the names of the other side.

    to_files False: a QuantDir with the names that ``model`` has; True: a ModelSource of ``model`` with those of its files.
    Where one side holds the weights of several layers as one (experts), quantized layers are joined or cut by rows; which rows
    go where, transformers' own converters show on row numbers. Float tensors go through the converters themselves, when they
    are asked for. ``experts``: parameters whose experts are layers of their own under the names of the model, and how the model
    uses them. CheckpointError for other quantized layers that cannot be cut or joined this way, and for missing experts.
    """

    def __init__(self, source: Any, model: nn.Module, to_files: bool = False) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self._model = model
        self._to_files = to_files
        self._renamings, self._converters = weight_conversions(model, to_files)
        self.layers: dict[str, str] = {}  # name -> the source's, the first of them where a layer is made of several
        self._rows: dict[str, tuple[Run, ...]] = {}  # what they are made of
        self.experts: dict[str, str] = {}
        self._cuts: dict[str, tuple[Run, ...]] = {}  # float weights made of rows, by new name
        self._groups: dict[str, list[Member]] = {}  # by first new name
        self._homes: dict[str, str | None] = {}  # new name -> its group, or None where it is only renamed
        self._old: dict[str, str] = {}
        self._meta: dict[str, Tensor] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._read: tuple[str, PackedLinear | None] = ("", None)
        self._apart: set[str] = set()
        if to_files:
            self._add_experts()
        for name, use in getattr(source, "experts", {}).items():
            members = [each for each in (*source.layers, *source.floats) if each.startswith(f"{name}.")]
            self._keep(Member(name, "", dict.fromkeys(members, 0), stacked=True), use)
        for name in source.layers:
            if name not in self._apart:
                self._add_layer(name)
        for name in source.floats:
            if name not in self._apart:
                self._add_float(name)
        for group, members in self._groups.items():
            # files list expert 10 before expert 2, and converters join in the order they are given
            members.sort(key=lambda member: natural_order(member.name))
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

    def parts(self, name: str) -> tuple[Run, ...]:
        """The rows that a layer, or a float tensor, is put together of; none where it is only renamed, or a converter makes it."""
        runs = self._rows.get(name) or self._cuts.get(name, ())
        return () if len(runs) == 1 and runs[0] == Run(runs[0].source) else runs

    def rename(self, name: str) -> str | None:
        """What transformers calls the tensor ``name`` on the other side; None where it would convert it."""
        new, pattern = self._renamed(name)
        return new if pattern is None else None

    @property
    def used(self) -> list[Any]:
        """The renamings and converters of transformers that any name has fitted."""
        return [each for each in (*self._renamings, *self._converters) if each.was_used()]

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
        runs = self._rows[name]
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
            sources = {}
            for e, expert in enumerate(experts.children()):
                source = f"{name}.{e}" if isinstance(expert, QuantLinear) else f"{name}.{e}.weight"
                sources[source] = expert.out_features
            self._apart |= set(sources)
            first, pattern = self._renamed(name)
            member = Member(name, pattern or "", sources, stacked=True)
            if pattern is None or experts.use != "linear":
                self._keep(member, experts.use)
            else:
                self._groups.setdefault(first, []).append(member)

    def _keep(self, member: Member, use: str) -> None:
        """Experts that no file knows apart: their names are those of the model, with what stands before them renamed."""
        self.experts[_apply(self._renamings, member.name)] = use
        self._apart |= set(member.sources)
        for source in member.sources:
            new = _apply(self._renamings, source)
            if source in self.source.layers:
                self._make(new, (Run(source),))
            else:
                self._homes[new], self._old[new] = None, source

    def _make(self, name: str, runs: tuple[Run, ...]) -> None:
        self.layers[name], self._rows[name] = runs[0].source, runs

    def _add_layer(self, name: str) -> None:
        new, pattern = self._renamed(f"{name}.weight")
        if pattern is None:
            self._make(new.removesuffix(".weight"), (Run(name),))
        else:
            member = Member(f"{name}.weight", pattern, {name: self.source.rows(name)})
            self._groups.setdefault(new, []).append(member)

    def _add_float(self, name: str) -> None:
        new, pattern = self._renamed(name)
        if pattern is None:
            self._homes[new], self._old[new] = None, name
        else:
            self._groups.setdefault(new, []).append(Member(name, pattern))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The new name, and the pattern of the converter it takes part in. Files: renaming comes last, after conversion."""
        if not self._to_files:
            name = _apply(self._renamings, name)
        for converter in self._converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, pattern
        return (_apply(self._renamings, name) if self._to_files else name), None

    def _resolve(self, group: str, members: list[Member]) -> None:
        """Find what the converter makes of one group."""
        if not self._to_files and (absent := absent_experts(members)):
            raise CheckpointError(f"{self.folder} lacks {absent[0]}: {group} is made of all of them")
        if not any(member.sources for member in members):
            for new, tensor in self._try_convert(group, self._empty).items():
                self._homes[new], self._meta[new] = group, tensor
            return
        try:
            made = self._made_of_rows(group, members)
        except CheckpointError:
            if not all(member.stacked for member in members):
                raise
            for member in members:
                self._keep(member, "linear")
            return
        for name, runs in made.items():
            if runs[0].source in self.source.layers:
                self._make(name, runs)
            else:
                self._cuts[f"{name}.weight"] = runs

    def _made_of_rows(self, group: str, members: list[Member]) -> dict[str, tuple[Run, ...]]:
        """Linears and the rows that the converter makes them of. CheckpointError where it does something else."""
        for member in members:
            if not member.sources:
                shape = self.source.shape(member.name)
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{member.name} has shape {shape}, quantized layers beside it have two dimensions"
                    )
                member.sources = {member.name: shape[0]}
        numbers = RowNumbers({source: rows for member in members for source, rows in member.sources.items()})

        def read(member: Member) -> Tensor:
            tensors = [numbers.of(source) for source in member.sources]
            return torch.stack(tensors) if member.stacked else tensors[0]

        made = self._try_convert(group, read)
        return {
            name: self._checked(name, numbers.runs(weight), members)
            for new in sorted(made, key=natural_order)
            for name, weight in self._weights(new, made[new], members).items()
        }

    def _weights(self, new: str, made: Tensor, members: list[Member]) -> dict[str, Tensor]:
        """Linears and their weights in what a converter made; experts in one tensor are as many Linears."""
        if made.dim() == 2 and new.endswith(".weight"):
            return {new.removesuffix(".weight"): made}
        if made.dim() != 3 or self._to_files:
            raise CheckpointError(
                f"{members[0].name} is quantized, but would become {new} of {made.dim()} dimensions, which is no Linear"
            )
        count = expert_count(self._model, new)
        if count is not None and count != len(made):
            absent = absent_experts(members, count)
            what = f"lacks {absent[0]}" if absent else "does not fit"
            raise CheckpointError(f"{self.folder} {what}: {new} has {count} experts in the model, {len(made)} there")
        self.experts[new] = "linear"
        return {f"{new}.{e}": weight for e, weight in enumerate(made)}

    def _checked(self, name: str, runs: tuple[Run, ...] | None, members: list[Member]) -> tuple[Run, ...]:
        if runs is None:
            raise CheckpointError(
                f"{members[0].name} is quantized, and {name} is not made of its rows, so that its groups cannot be kept"
            )
        quantized = [run.source for run in runs if run.source in self.source.layers]
        left = [run.source for run in runs if run.source not in self.source.layers]
        if quantized and left:
            raise CheckpointError(
                f"{quantized[0]} is quantized, {left[0]} is not, and both are one layer on the other side: {name}"
            )
        kinds = {(self.source.shape(source)[1:], self.source.dtype(source)) for source in left}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{left[0]} and {left[-1]} are one layer, but differ in input channels or dtype: {name}"
            )
        return runs

    def _try_convert(self, group: str, read: Callable[[Member], Tensor]) -> dict[str, Tensor]:
        """CheckpointError where transformers' own code, on what may be anything, fails."""
        try:
            return self._convert(group, read)
        except Exception as error:
            members = self._groups[group]
            fitted = {member.pattern for member in members}
            absent = [pattern for pattern in self._converter(group).source_patterns if pattern not in fitted]
            more = f"; nothing is called {', '.join(absent)}" if absent else ""
            raise CheckpointError(
                f"{members[0].name} and the like cannot be converted ({group}): {error}{more}"
            ) from error

    def _converter(self, group: str) -> Any:
        pattern = self._groups[group][0].pattern
        return next(converter for converter in self._converters if pattern in converter.source_patterns)

    def _convert(self, group: str, read: Callable[[Member], Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self._converter(group))
        for member in self._groups[group]:
            converter.add_tensor(group, member.name, member.pattern, read(member))
        made = converter.convert(group, model=self._model, config=self._model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {_apply(self._renamings, n): t for n, t in found.items()} if self._to_files else found

    def _empty(self, member: Member) -> Tensor:
        return torch.empty(self.source.shape(member.name), dtype=self.source.dtype(member.name), device="meta")


def _apply(renamings: Iterable[Any], name: str) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
