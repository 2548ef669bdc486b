"""Translate between the names of weights in files and in memory, where transformers 5 renames and joins some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import QuantLinear
from ..standins.expert_linears import ExpertLinears, expert_count
from ..standins.transposed import has_transposed_form, replaceable_by_linear
from .conversions import Conversions
from .formats import CheckpointError, InMemory, PackedLinear
from .formats.packed import fitting_bias
from .joined import Part, RowNumbers, Run, absent_experts, checked_runs, cut_layer, join_layers, natural_order


class Renamed:
    """A source of layers and float tensors (a QuantDir, a ModelSource) under the names of the other side.

    to_files False: a QuantDir with the names that ``model`` has; True: a ModelSource of ``model`` with those of its files.
    Where one side holds the weights of several layers as one (experts), quantized layers are joined or cut by rows; which rows
    go where, transformers' own converters show on row numbers. Float tensors go through the converters themselves, when they
    are asked for. ``experts``: parameters whose experts are layers of their own under the names of the model, and how the model
    uses them. CheckpointError for other quantized layers that cannot be cut or joined this way, and for missing experts.
    ``dequantized``: float tensors among ``floats`` -> the quantized layer they are made of, where the model has no Linear but
    something else with a weight (a router). ``left_out``: names of what converters would make, but the model has not.
    """

    def __init__(self, source: Any, model: nn.Module, to_files: bool = False) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self._model = model
        self._to_files = to_files
        self.in_memory: InMemory | None = None if to_files else source.in_memory
        # where the names are those of the model in memory there is nothing to translate
        self._conversions = Conversions(None if self.in_memory is not None else model, to_files)
        self.layers: dict[str, str] = {}  # name -> the source's, the first of them where a layer is made of several
        self._rows: dict[str, tuple[Run, ...]] = {}  # what they are made of
        self.experts: dict[str, str] = {}
        self._cuts: dict[str, tuple[Run, ...]] = {}  # float weights made of rows, by new name
        self._groups: dict[str, list[Part]] = {}  # by first new name
        self._homes: dict[str, str | None] = {}  # new name -> its group, or None where it is only renamed
        self._old: dict[str, str] = {}
        self._meta: dict[str, Tensor] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self._read: tuple[str, PackedLinear | None] = ("", None)
        self._apart: set[str] = set()
        self.left_out: list[str] = []
        if to_files:
            self._add_experts()
        for name, use in getattr(source, "experts", {}).items():
            experts = [each for each in (*source.layers, *source.floats) if each.startswith(f"{name}.")]
            self._keep(Part(name, "", dict.fromkeys(experts, 0), stacked=True), use)
        for name in source.layers:
            if name not in self._apart:
                self._add_layer(name)
        for name in source.floats:
            if name not in self._apart:
                self._add_float(name)
        for group, parts in self._groups.items():
            # files list expert 10 before expert 2, and converters join in the order they are given
            parts.sort(key=lambda part: natural_order(part.name))
            self._resolve(group, parts)
        self.heads = [name for name, old in self.layers.items() if old in source.heads]
        self.dequantized = {} if to_files or self.in_memory is not None else self._dequantized()
        self.floats: Iterable[str] = [*self._homes, *self._cuts, *self.dequantized]

    def linears(self, modules: Iterable[str]) -> list[str]:
        """List the new names of these float Linears, and of those that float experts become one by one."""
        found = []
        for module in modules:
            new, pattern = self._conversions.find(f"{module}.weight")
            if pattern is None:
                found.append(new)
        joined = [name for name, group in self._homes.items() if group is not None]
        found += [n for n in (*joined, *self._cuts) if n.endswith(".weight") and len(self.shape(n)) == 2]
        return [name.removesuffix(".weight") for name in dict.fromkeys(found)]

    def renamed(self, modules: Iterable[str]) -> dict[str, str]:
        """Map new names to old ones where they differ: of quantized layers and these float Linears, if one on both sides."""
        found = {name: self.layers[name] for name in self.layers if not self.runs(name)}
        for module in modules:
            new, pattern = self._conversions.find(f"{module}.weight")
            if pattern is None:
                found[new.removesuffix(".weight")] = module
        return {new: old for new, old in found.items() if new != old}

    def layer(self, name: str) -> PackedLinear:
        """Read one of ``layers``."""
        return self._assemble(name, self.source.layer)

    def outline(self, name: str) -> PackedLinear:
        """Read the same, of a model without codes."""
        return self._assemble(name, self.source.outline)

    def empty_tensors(self, name: str) -> dict[str, Tensor]:
        """See QuantDir.empty_tensors; of a layer that is only renamed."""
        return self.source.empty_tensors(self.layers[name])

    def layer_of(self, name: str, read: Mapping[str, Tensor]) -> PackedLinear:
        """Make a layer that is only renamed of tensors that were read already; see QuantDir.layer."""
        return self.source.layer(self.layers[name], read)

    def bits(self, name: str) -> int:
        """See QuantDir.bits."""
        return self.source.bits(self.layers[name])

    def runs(self, name: str) -> tuple[Run, ...]:
        """List the rows that make up a layer or float tensor; none where it is only renamed, or a converter makes it."""
        runs = self._rows.get(name) or self._cuts.get(name, ())
        return () if len(runs) == 1 and runs[0] == Run(runs[0].source) else runs

    def rename(self, name: str) -> str | None:
        """Give the name of a tensor on the other side; None where transformers would convert it."""
        new, pattern = self._conversions.find(name)
        return new if pattern is None else None

    @property
    def used(self) -> list[Any]:
        """The renamings and converters of transformers that any name has fitted."""
        return self._conversions.used

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``, or a tensor that is tied to one."""
        if name in self.dequantized:
            return tuple(self.float_tensor(name).shape)
        if name in self._cuts:
            runs = self._cuts[name]
            return (sum(run.stop - run.start for run in runs), *self.source.shape(runs[0].source)[1:])
        return tuple(self._meta[name].shape) if self._homes.get(name) else self.source.shape(self._old.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``, or a tensor that is tied to one."""
        if name in self.dequantized:
            return torch.float32
        if name in self._cuts:
            return self.source.dtype(self._cuts[name][0].source)
        return self._meta[name].dtype if self._homes.get(name) else self.source.dtype(self._old.get(name, name))

    def float_tensor(self, name: str) -> Tensor:
        """Read, or make, one of ``floats``."""
        if name in self.dequantized:
            return self._dequantize(name)
        if name in self._cuts:
            return torch.cat([self.source.float_tensor(r.source)[r.start : r.stop] for r in self._cuts[name]])
        if (group := self._homes[name]) is None:
            return self.source.float_tensor(self._old[name])
        if self._made[0] != group:
            self._made = (group, self._convert(group, lambda part: self.source.float_tensor(part.name)))
        return self._made[1][name]

    def _dequantized(self) -> dict[str, str]:
        """Take from ``layers`` those whose place in the model no Linear could fill, but something with a weight [N, K]."""
        found, known = {}, {}
        for name, module in self._model.named_modules():
            weight = module._parameters.get("weight")
            if name not in self.layers or weight is None or weight.dim() != 2 or has_transposed_form(module):
                continue
            kind = type(module)
            if kind not in known:
                known[kind] = replaceable_by_linear(module)
            if not known[kind]:
                del self.layers[name]
                found |= {
                    f"{name}.{leaf}": name for leaf in ("weight", "bias") if module._parameters.get(leaf) is not None
                }
        return found

    def _dequantize(self, name: str) -> Tensor:
        layer = self.layer(self.dequantized[name])
        bias = fitting_bias(layer, f"{self.dequantized[name]}.bias" in self.dequantized, self.dequantized[name])
        if name.endswith(".bias"):
            return bias
        weight = layer.dequantize()
        return weight if layer.pre_quant_scale is None else weight * layer.pre_quant_scale

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
        """Add the experts that quantize() took apart: converters know them by the name of the parameter that they were."""
        for name, experts in self._model.named_modules():
            if not isinstance(experts, ExpertLinears):
                continue
            sources = {}
            for e, expert in enumerate(experts.children()):
                source = f"{name}.{e}" if isinstance(expert, QuantLinear) else f"{name}.{e}.weight"
                sources[source] = expert.out_features
            self._apart |= set(sources)
            first, pattern = self._conversions.find(name)
            part = Part(name, pattern or "", sources, stacked=True)
            if pattern is None or experts.use != "linear":
                self._keep(part, experts.use)
            else:
                self._groups.setdefault(first, []).append(part)

    def _keep(self, part: Part, use: str) -> None:
        """Leave experts as the model has them, where no file has names for them one by one; what stands before is renamed."""
        self.experts[self._conversions.rename(part.name)] = use
        self._apart |= set(part.sources)
        for source in part.sources:
            new = self._conversions.rename(source)
            if source in self.source.layers:
                self._make(new, (Run(source),))
            else:
                self._homes[new], self._old[new] = None, source

    def _make(self, name: str, runs: tuple[Run, ...]) -> None:
        self.layers[name], self._rows[name] = runs[0].source, runs

    def _add_layer(self, name: str) -> None:
        new, pattern = self._conversions.find_weight(name)
        if pattern is None:
            self._make(new.removesuffix(".weight"), (Run(name),))
        else:
            part = Part(f"{name}.weight", pattern, {name: self.source.rows(name)})
            self._groups.setdefault(new, []).append(part)

    def _add_float(self, name: str) -> None:
        new, pattern = self._conversions.find(name)
        if pattern is None:
            self._homes[new], self._old[new] = None, name
        else:
            self._groups.setdefault(new, []).append(Part(name, pattern))

    def _resolve(self, group: str, parts: list[Part]) -> None:
        """Find what the converter makes of one group."""
        if self._conversions.lacks(group):
            self.left_out.append(group)
            return
        if not self._to_files and (absent := absent_experts(parts)):
            raise CheckpointError(f"{self.folder} lacks {absent[0]}: {group} is made of all of them")
        if not any(part.sources for part in parts):
            for new, tensor in self._try_convert(group, self._empty).items():
                self._homes[new], self._meta[new] = group, tensor
            return
        try:
            made = self._made_of_rows(group, parts)
        except CheckpointError:
            if not all(part.stacked for part in parts):
                raise
            for part in parts:
                self._keep(part, "linear")
            return
        for name, runs in made.items():
            if runs[0].source in self.source.layers:
                self._make(name, runs)
            else:
                self._cuts[f"{name}.weight"] = runs

    def _made_of_rows(self, group: str, parts: list[Part]) -> dict[str, tuple[Run, ...]]:
        """Tell of which rows the converter makes which Linears. CheckpointError where it does something else."""
        for part in parts:
            if not part.sources:
                shape = self.source.shape(part.name)
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{part.name} has shape {shape}, quantized layers beside it have two dimensions"
                    )
                part.sources = {part.name: shape[0]}
        numbers = RowNumbers({source: rows for part in parts for source, rows in part.sources.items()})

        def read(part: Part) -> Tensor:
            tensors = [numbers.of(source) for source in part.sources]
            return torch.stack(tensors) if part.stacked else tensors[0]

        made = self._try_convert(group, read)
        return {
            name: checked_runs(self.source, name, numbers.runs(weight), parts)
            for new in sorted(made, key=natural_order)
            for name, weight in self._weights(new, made[new], parts).items()
        }

    def _weights(self, new: str, made: Tensor, parts: list[Part]) -> dict[str, Tensor]:
        """Split what a converter made into Linears and their weights; experts in one tensor are as many Linears."""
        if made.dim() == 2 and new.endswith(".weight"):
            return {new.removesuffix(".weight"): made}
        if made.dim() != 3 or self._to_files:
            raise CheckpointError(
                f"{parts[0].name} is quantized, but would become {new} of {made.dim()} dimensions, which is no Linear"
            )
        count = expert_count(self._model, new)
        if count is not None and count != len(made):
            absent = absent_experts(parts, count)
            what = f"lacks {absent[0]}" if absent else "does not fit"
            raise CheckpointError(f"{self.folder} {what}: {new} has {count} experts in the model, {len(made)} there")
        self.experts[new] = "linear"
        return {f"{new}.{e}": weight for e, weight in enumerate(made)}

    def _try_convert(self, group: str, read: Callable[[Part], Tensor]) -> dict[str, Tensor]:
        """Convert one group; CheckpointError where transformers' own code, on what may be anything, fails."""
        try:
            return self._convert(group, read)
        except Exception as error:
            parts = self._groups[group]
            absent = self._conversions.absent_patterns({part.pattern for part in parts})
            more = f"; nothing is called {', '.join(absent)}" if absent else ""
            raise CheckpointError(
                f"{parts[0].name} and the like cannot be converted ({group}): {error}{more}"
            ) from error

    def _convert(self, group: str, read: Callable[[Part], Tensor]) -> dict[str, Tensor]:
        tensors = [(part.name, part.pattern, read(part)) for part in self._groups[group]]
        return self._conversions.convert(group, tensors, self._model)

    def _empty(self, part: Part) -> Tensor:
        return torch.empty(self.source.shape(part.name), dtype=self.source.dtype(part.name), device="meta")
