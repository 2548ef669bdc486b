"""Say what every checkpoint layout does (Layout), and what a config says of a model (Summary)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .in_memory import InMemory
from .packed import CheckpointError, PackedLinear, exactly, expect
from .settings import Settings

# what vLLM, SGLang and TensorRT-LLM make one matrix of
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Facts:
    """What of a PackedLinear the config of a whole model depends on."""

    in_features: int
    out_features: int
    group_size: int
    groups: int
    symmetric: bool
    bits: int = 4
    rescaled: float = 1.0

    @classmethod
    def of(cls, layer: PackedLinear) -> Facts:
        """Collect them from one layer."""
        sizes = (layer.in_features, layer.out_features, layer.group_size, layer.groups)
        return cls(*sizes, layer.symmetric, layer.bits, layer.rescaled)


@dataclass(frozen=True)
class Summary:
    """What a config says of a model: its quantized layers by name, and the names of Linears left float.

    experts: parameters [E, N, K] of which ``layers`` has each matrix, as ``name.0``, ``name.1``, ... -> how the model uses them.
    in_memory: what awq_ext.save adds. heads: those of ``layers`` that are output layers of a language model.
    renamed: name in the files -> name of the same module in a model of transformers, where the two differ.
    """

    layers: Mapping[str, Facts]
    float_linears: Sequence[str] = ()
    experts: Mapping[str, str] = field(default_factory=dict)
    in_memory: InMemory | None = None
    heads: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def called(self, names: Iterable[str]) -> list[str]:
        """List ``names``, then what transformers calls them in memory: it asks by that name, servers by that of the files."""
        found = list(names)
        return [*found, *(self.renamed[name] for name in found if name in self.renamed)]

    def group_sizes(self) -> list[int]:
        """List the sizes a reader must know: of layers with several groups; [-1] (or the rows' one length) if there is none."""
        several = {facts.group_size for facts in self.layers.values() if facts.groups > 1}
        if several:
            return sorted(several)
        lengths = {facts.in_features for facts in self.layers.values()}
        same = len(lengths) == 1 and lengths == {facts.group_size for facts in self.layers.values()}
        return [lengths.pop()] if same else [-1]

    def widths(self) -> list[int]:
        """List the bits of the layers, the least first."""
        return sorted({facts.bits for facts in self.layers.values()})

    def half_joined(self) -> list[str]:
        """Name the quantized layers that servers join with neighbours which are float, or have other groups or bits."""
        found, known = [], {*self.layers, *self.float_linears}
        for name, facts in self.layers.items():
            prefix, _, leaf = name.rpartition(".")
            for parts in JOINED:
                others = [f"{prefix}.{part}".lstrip(".") for part in parts if leaf in parts and part != leaf]
                mates = [self.layers.get(other) for other in others if other in known]
                if any(mate is None or _size(mate) != _size(facts) for mate in mates):
                    found.append(name)
        return found

    @property
    def symmetric(self) -> bool:
        """Whether all layers are."""
        return all(facts.symmetric for facts in self.layers.values())


class Layout:
    """A way to lay out quantized Linears in a checkpoint. Stateless; ``formats.LAYOUTS`` has one object of each.

    name: what users call it; suffixes: the tensors that every layer has, the first of them only quantized layers; optional:
    those that some layers have.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    rows_at: ClassVar[tuple[str, int]]  # the tensor and dimension that tell out_features
    optional: ClassVar[tuple[str, ...]] = ("bias",)
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16,)
    widths: ClassVar[tuple[int, ...]] = (4,)  # bits that its layers can have
    mixes_group_sizes: ClassVar[bool] = False
    short_groups: ClassVar[bool] = False  # may the last group of a row be short
    run_time_scales: ClassVar[bool] = False
    quantized_heads: ClassVar[bool] = False  # do its readers take an output layer of ints for what it is
    holds_rescaled: ClassVar[bool] = False
    joined_experts: ClassVar[bool] = False  # experts under the names of transformers 5's parameters
    holds_memory: ClassVar[bool] = False  # all that a model has in memory: see InMemory
    divisors: ClassVar[tuple[int, int]] = (1, 1)  # of out_features and in_features
    default_group_size: ClassVar[int] = 128  # what the commands take
    # bits of which the commands make symmetric layers, as readers take no others
    symmetric_bits: ClassVar[tuple[int, ...]] = ()
    own_writer: ClassVar[bool] = False  # do its readers need more than tensors and a quantization_config

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        """Make the tensors of a layer, by suffix, exactly, if :meth:`problems` finds none; ``summary`` is of its model."""
        raise NotImplementedError

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        """Invert :meth:`pack`. CheckpointError for missing tensors, wrong shapes or dtypes, values out of range."""
        raise NotImplementedError

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        """Make the entry of config.json."""
        raise NotImplementedError

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        """Read a quantization_config of this layout; None for another; CheckpointError for one that cannot be used."""
        raise NotImplementedError

    def config(self, config: Mapping[str, Any], source: Any, summary: Summary) -> dict[str, Any]:
        """Add to a model's config.json what readers of this layout look for there."""
        return {**config, "quantization_config": self.quantization_config(summary)}

    def foresee(self, source: Any, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError where this layout's readers do not know a model of this config.json, or a part of it."""
        return

    def write_weights(self, folder: Path, source: Any, summary: Summary, config: Mapping[str, Any]) -> bool:
        """Write all tensors to ``folder`` as files of this layout's own; False, and nothing is done: as safetensors."""
        return False

    def files(self, summary: Summary) -> dict[str, dict[str, Any]]:
        """Make further JSON files beside config.json, by name."""
        return {}

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        """Tell whether tensors of these names and dtypes are a quantized layer of this layout."""
        return self.suffixes[0] in leaves

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        """List what of ``layer`` this layout cannot hold, each with the choice that fixes it. Empty: :meth:`pack` is exact."""
        found = []
        n, k, g = layer.out_features, layer.in_features, layer.group_size
        if layer.bits not in self.widths:
            held = " or ".join(map(str, self.widths))
            rounded = ', "compressed-tensors-w8a8"' if layer.bits == 8 and layer.groups == 1 and layer.symmetric else ""
            found.append(
                f'it has {layer.bits} bits, not {held}: use format="compressed-tensors"{rounded}, "gptq", "mlx", "native" or '
                f'"gguf" (that only if it is symmetric), or quantize with bits={held} (an output layer: with head="int{held}")'
            )
        if layer.pre_quant_scale is not None and not self.run_time_scales:
            found.append('its input is scaled at run time, for which there is no slot: quantize with fold="always"')
        no_width = k % self.divisors[1]  # then no group size helps, and the reason below is the only one
        if not self.short_groups and g != -1 and k % g and not no_width:
            found.append(
                f"in_features={k} is not a multiple of group_size={g}: quantize with {fitting_group(k)}, or leave the layer float "
                "with skip="
            )
        for value, what, divisor in zip((n, k), ("out_features", "in_features"), self.divisors, strict=True):
            if value % divisor:
                found.append(f"{what}={value} is not a multiple of {divisor}: leave the layer float with skip=")
        if layer.rescaled != 1 and not self.holds_rescaled:
            found.append(
                "the model's own first forward multiplies its weight in place, and would do so once more after loading: use "
                'format="native", which tells it'
            )
        if self.stored_scales(layer) is None:
            found.append(
                f"its {str(layer.scales.dtype).removeprefix('torch.')} scales cannot be stored exactly as "
                f"{' or '.join(str(d).removeprefix('torch.') for d in self.scale_dtypes)}: quantize with "
                'scale_dtype="float16"'
            )
        return found

    def stored_scales(self, layer: PackedLinear) -> Tensor | None:
        """Cast the layer's scales to a dtype this layout has; None where that would change them."""
        if layer.scales.dtype in self.scale_dtypes:
            return layer.scales
        return next((s for d in self.scale_dtypes if (s := exactly(layer.scales, d)) is not None), None)

    def model_problems(self, summary: Summary) -> list[str]:
        """List what does not fit of the model as a whole, in the same form as :meth:`problems`."""
        found = []
        if summary.heads and not self.quantized_heads:
            found.append(
                f"{', '.join(summary.heads)} is quantized, which readers of this format take for a float output layer: use "
                'format="compressed-tensors", "gptq", "mlx", "gguf" or "native", or quantize with head="float"'
            )
        if summary.experts and not self.joined_experts:
            found.append(
                f"{next(iter(summary.experts))} and alike hold experts in a form of which this format's readers know none: "
                'use format="native", or leave them float with skip='
            )
        if self.mixes_group_sizes:
            return found
        size, *others = summary.group_sizes()
        if others:
            sizes = ", ".join(map(str, (size, *others)))
            return [*found, f"layers have different group sizes ({sizes}): use one for all"]
        odd = [name for name, facts in summary.layers.items() if not _same_groups(facts, size)]
        if odd:
            found.append(f"{odd[0]} has other groups than group_size={size}: use one size that fits all layers")
        return found

    def require(self, tensors: Mapping[str, Tensor], needed: Sequence[str] = ()) -> None:
        """Raise CheckpointError unless all that are ``needed``, or else of ``suffixes``, are there."""
        if missing := [suffix for suffix in needed or self.suffixes if suffix not in tensors]:
            raise CheckpointError(f"{', '.join(missing)} is missing, which the {self.name} layout needs")

    def bias_of(self, tensors: Mapping[str, Tensor], out_features: int) -> Tensor | None:
        """Check the bias and return it; None where there is none."""
        if (bias := tensors.get("bias")) is not None:
            expect("bias", bias, (out_features,), FLOATS)
        return bias


def fitting_group(in_features: int) -> str:
    """Write the largest usual group size that divides ``in_features`` as an argument; -1, one group a row, always does."""
    return f"group_size={next((size for size in (128, 64, 32, 16) if in_features % size == 0), -1)}"


def _size(facts: Facts) -> tuple[int, int]:
    return -1 if facts.groups == 1 else facts.group_size, facts.bits


def _same_groups(facts: Facts, group_size: int) -> bool:
    """Tell whether a reader that splits the row by ``group_size`` finds this layer's groups."""
    if facts.groups == 1:
        return group_size in (-1, facts.in_features)
    return facts.group_size == group_size
