"""MLX's affine quantized layers, as mlx-lm's directories have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....reporting.warn import warn
from ..layout import FLOATS, Facts, Layout, Summary
from ..packed import CheckpointError, PackedLinear, expect, middle_code
from ..settings import Rule, Settings, anything, checked_group_size, int_setting, one_of, require_known
from ..words import rows_of, words_of

SIZES = (128, 64, 32)  # of groups, for which MLX has kernels
# mlx-lm's code, by config.json's model_type, that was run on layers written here: tests/counterparts/test_mlx.py
KNOWN = (
    "cohere", "gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_NOT_SILU = ("gemma", "gemma2", "phi", "starcoder2")  # whose code reads the activation, or has another
_KNOWN = {"group_size": anything, "bits": anything, "mode": one_of("affine")}
_NEAR = 2**-6  # for what products of roundings add to their sum
_EXPERT = re.compile(r"(.*\.experts)\.\d+(\..*)")


class Mlx(Layout):
    """weight uint32 [N, K/P] (P = 32 / bits, lowest bits first), scales and biases [N, K/g]: W = scale * code + bias.

    bias = -zero * scale, rounded to the dtype of the scales, which is the layer's own. Exact for symmetric layers, as their
    zero is a power of two; otherwise off by at most zero * u of a step, u = 2^-11 in fp16, 2^-8 in bf16. A layer of which that
    would lead to another zero is refused. Groups of other lengths are stored as several of 128, 64 or 32.
    """

    name = "mlx"
    rows_at = ("scales", 0)
    suffixes = ("weight", "scales", "biases")
    scale_dtypes = FLOATS
    widths = (4, 8)
    mixes_group_sizes = True
    quantized_heads = True
    own_writer = True

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if (layer.in_features if layer.group_size == -1 else layer.group_size) % SIZES[-1]:
            found.append(f"its groups are no multiple of {SIZES[-1]} weights: quantize with group_size=32, 64 or 128")
        scales = self.stored_scales(layer)
        if scales is None or layer.bits not in self.widths:
            return found
        biases = _biases(scales, layer.zeros)
        if not bool(biases.isfinite().all()):
            found.append(f"zero * scale leaves the range of {scales.dtype}: use another format")
        elif not torch.equal(_zeros(scales, biases, layer.bits), layer.zeros):
            found.append(
                f"-zero * scale, rounded to {str(scales.dtype).removeprefix('torch.')}, leads to other zeros: quantize with "
                'symmetric=True, or scale_dtype="float16"'
            )
        return found

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        length = layer.in_features // layer.groups
        repeats = length // _size(length)  # groups there that share a scale here
        scales, zeros = (t.repeat_interleave(repeats, dim=1) for t in (self.stored_scales(layer), layer.zeros))
        weight = words_of(layer.qweight).view(torch.uint32)
        tensors = {"weight": weight, "scales": scales, "biases": _biases(scales, zeros)}
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        weight, scales, bits = tensors["weight"], tensors["scales"], settings.width
        if weight.dim() != 2 or scales.dim() != 2 or 0 in (*weight.shape, *scales.shape):
            raise CheckpointError(f"weight and scales have shapes {tuple(weight.shape)} and {tuple(scales.shape)}")
        (n, words), groups = weight.shape, scales.shape[1]
        k = words * 32 // bits
        expect("weight", weight, (n, words), (torch.uint32,))
        expect("scales", scales, (n, groups), FLOATS)
        expect("biases", tensors["biases"], (n, groups), (scales.dtype,))
        size = settings.group_size(k, groups)
        zeros = _read_zeros(scales, tensors["biases"], bits)
        rows = rows_of(weight.view(torch.int32), k, bits)
        return PackedLinear(rows, scales.contiguous(), zeros, k, size, self.bias_of(tensors, n), bits=bits)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        kinds = {name: _kind(facts) for name, facts in summary.layers.items()}
        all_kinds = list(kinds.values())
        usual = max(sorted(set(all_kinds)), key=all_kinds.count)
        named = {name: _entry(kind) for name, kind in kinds.items() if kind != usual}
        return {**_entry(usual), **named, **dict.fromkeys(summary.float_linears, False)}

    def config(self, config: Mapping[str, Any], source: Any, summary: Summary) -> dict[str, Any]:
        """Add what mlx-lm reads, which takes a head for tied unless it is told otherwise."""
        entry = self.quantization_config(summary)
        tied = not summary.heads and bool(config.get("tie_word_embeddings", "lm_head.weight" not in source.floats))
        return {**config, "tie_word_embeddings": tied, "quantization": entry, "quantization_config": entry}

    def foresee(self, source: Any, config: Mapping[str, Any]) -> None:
        kind = config.get("model_type")
        if kind not in KNOWN:
            raise CheckpointError(
                f"MLX: model_type={kind!r} of config.json is not among those of which mlx-lm's code was tried on such layers "
                f"({', '.join(KNOWN)}): use another format"
            )
        activation = config.get("hidden_act", "silu")
        if kind not in _NOT_SILU and activation not in ("silu", "swish"):
            raise CheckpointError(
                f"MLX: hidden_act={activation!r}: mlx-lm's {kind} computes silu whatever config.json says: use another format"
            )
        _require_alike_experts(source)
        floats, dtype = ("float16", "bfloat16"), str(config.get("dtype") or config.get("torch_dtype"))
        layer = source.outline(next(iter(source.layers)))
        scales = str(layer.scales.dtype).removeprefix("torch.")
        if dtype in floats and scales in floats and dtype != scales:
            warn(
                f"the model is {dtype}, its scales are {scales}: MLX then computes in float32, which takes longer. Quantize "
                f'with scale_dtype="{dtype}", or load the float model with dtype="{scales}"'
            )

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if "quant_method" in config or "desc_act" in config or not {"group_size", "bits"} <= config.keys():
            return None
        named = {name: said for name, said in config.items() if isinstance(said, (dict, bool))}
        require_known({name: said for name, said in config.items() if name not in named}, _KNOWN)
        size, bits = checked_group_size(int_setting(config, "group_size")), int_setting(config, "bits")
        rules = tuple(_rule(name, said, size, bits) for name, said in named.items())
        return Settings((size,), rules=rules, problem=_unread(bits), width=bits)

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("weight") == torch.uint32 and "scales" in leaves


def _size(length: int) -> int:
    """Choose the size of the groups that a group of ``length`` weights is stored as."""
    return next(size for size in SIZES if length % size == 0)


def _kind(facts: Facts) -> tuple[int, int]:
    return _size(facts.in_features // facts.groups), facts.bits


def _entry(kind: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": kind[0], "bits": kind[1], "mode": "affine"}


def _rule(name: str, said: Mapping[str, Any] | bool, size: int, bits: int) -> Rule:
    """Read the entry of one layer: settings of its own, True for the usual ones, False for a float layer."""
    fits = partial(str.__eq__, name)
    if said is False:
        return Rule(fits, problem="the config leaves it float, but the files hold it quantized")
    said = {} if said is True else said
    require_known(said, _KNOWN, f"quantization: {name}")
    own = int_setting(said, "bits")
    bits = bits if own is None else own
    return Rule(fits, checked_group_size(int_setting(said, "group_size"), size), _unread(bits), bits)


def _unread(bits: int) -> str:
    return "" if bits in Mlx.widths else f"it has {bits} bits; of this format awq_ext reads 4 or 8"


def _biases(scales: Tensor, zeros: Tensor) -> Tensor:
    """Round -zero * scale once: in fp64 no product of 8 and 24 bits is rounded."""
    return (-zeros.double() * scales.double()).to(scales.dtype)


def _zeros(scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Find the nearest zeros, uint8; the middle code where a scale is 0, whose weights are 0 with any."""
    zeros = (-biases.double() / scales.double()).round().clamp(0, (1 << bits) - 1)
    return torch.where(scales == 0, middle_code(bits), zeros.nan_to_num(0)).to(torch.uint8)


def _read_zeros(scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Find the zeros of biases that were rounded once, or by MLX's own quantizer, whose scales are rounded too, with a warning.

    Two roundings are as good as 2 * zero * u of a step. CheckpointError where that leaves open which zero was meant.
    """
    zeros = _zeros(scales, biases, bits)
    # scales that are no numbers are refused with the layer, and have no zeros to warn of
    if torch.equal(_biases(scales, zeros), biases) or not bool(scales.isfinite().all()):
        return zeros
    most = zeros.double() * torch.finfo(scales.dtype).eps  # which is 2 * u
    off = (-biases.double() / scales.double() - zeros).abs()
    near = torch.where(scales == 0, biases == 0, off <= most * (1 + _NEAR))
    farthest = f"{float(off.nan_to_num().max()):.2g} of a step"
    if not bool(near.all()) or float(most.max()) >= 0.5:
        raise CheckpointError(
            f"its biases are not -zero * scale with a whole zero from 0 to {(1 << bits) - 1} (the nearest is {farthest} away), or "
            f"{scales.dtype} does not tell which: quantize the float model here instead"
        )
    warn(
        "biases that MLX's own quantizer rounded are read as -zero * scale: weights differ from what MLX computes by up to "
        f"{farthest}"
    )
    return zeros


def _require_alike_experts(source: Any) -> None:
    """Raise CheckpointError unless the experts that mlx-lm stacks are all quantized, and alike."""
    kinds: dict[tuple[str, str], set[Any]] = {}
    names = [*source.layers, *(name.removesuffix(".weight") for name in source.floats)]
    for name in names:
        if found := _EXPERT.fullmatch(name):
            one = source.outline(name) if name in source.layers else None
            kinds.setdefault((found[1], found[2]), set()).add(None if one is None else (one.bits, one.group_size))
    for (experts, leaf), found in kinds.items():
        if len(found) > 1:
            raise CheckpointError(
                f"MLX: {experts}.*{leaf} are joined by mlx-lm, but some are float or have other bits or groups: give all "
                "experts of a layer the same settings"
            )
