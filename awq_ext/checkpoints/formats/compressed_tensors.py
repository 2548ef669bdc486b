"""compressed-tensors "pack-quantized" W4A16 and W8A16: what llm-compressor writes and vLLM reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .layout import FLOATS, Layout, Summary
from .packed import CheckpointError, PackedLinear, expect, middle_code
from .settings import (
    Rule,
    Settings,
    anything,
    checked_group_size,
    int_setting,
    one_of,
    regex,
    require_known,
)
from .words import pack_words, rows_of, unpack_words, words_of

_KNOWN = {
    **dict.fromkeys(("quant_method", "format", "quantization_status", "global_compression_ratio", "version"), anything),
    **dict.fromkeys(("config_groups", "ignore", "transform_config", "provider"), anything),
    # how transformers shall run it
    **dict.fromkeys(("run_compressed", "dequantize", "use_optimized_inference"), anything),
    "sparsity_config": lambda value: isinstance(value, dict) and value.get("format", "dense") == "dense",
}
_KNOWN_OF_GROUP = dict.fromkeys(("targets", "weights", "format"), anything)
_KNOWN_OF_WEIGHTS = {
    **dict.fromkeys(("num_bits", "type", "strategy", "group_size"), anything),  # checked below
    # the tensors tell these
    **dict.fromkeys(("symmetric", "actorder", "scale_dtype", "zp_dtype"), anything),
    **dict.fromkeys(("observer", "observer_kwargs"), anything),
    "dynamic": one_of(False),
}
_OFFLINE = ("weight_input", "weight_output")  # transforms that the stored weights have been through


class CompressedTensors(Layout):
    """weight_packed int32 [N, ceil(K/P)], weight_scale [N, G], weight_shape int64 [2]; weight_zero_point int32 [ceil(N/P), G].

    P is 32 / bits. Codes and zeros are stored as they are (the library takes them for signed values plus 8, or 128); zeros are
    packed along N, and absent where all are that.
    """

    name = "compressed-tensors"
    rows_at = ("weight_scale", 0)
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx", "bias")
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    widths = (4, 8)
    mixes_group_sizes = True
    quantized_heads = True

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        n, k = layer.out_features, layer.in_features
        tensors = {
            "weight_packed": words_of(layer.qweight),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not (summary or layer).symmetric:
            tensors["weight_zero_point"] = pack_words(layer.zeros.T, layer.bits).T.contiguous()
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        shape, scales, packed = tensors["weight_shape"], tensors["weight_scale"], tensors["weight_packed"]
        expect("weight_shape", shape, (2,), (torch.int64, torch.int32))
        n, k = shape.tolist()
        if n < 1 or k < 1 or scales.dim() != 2:
            raise CheckpointError(f"weight_shape is {[n, k]}, weight_scale has shape {tuple(scales.shape)}")
        groups, bits = scales.shape[1], settings.width
        expect("weight_packed", packed, (n, -(-k * bits // 32)), (torch.int32,))
        expect("weight_scale", scales, (n, groups), FLOATS)
        size = settings.group_size(k, groups)
        if (order := tensors.get("weight_g_idx")) is not None:
            expect("weight_g_idx", order, (k,), (torch.int32, torch.int64))
            if not torch.equal(order.long(), torch.arange(k) // (k if size == -1 else size)):
                raise CheckpointError("weight_g_idx reorders the channels (actorder=group), which awq_ext does not run")
        if (zeros := tensors.get("weight_zero_point")) is None:
            zeros = torch.full((n, groups), middle_code(bits), dtype=torch.uint8)
        else:
            expect("weight_zero_point", zeros, (-(-n * bits // 32), groups), (torch.int32,))
            zeros = unpack_words(zeros.T, n, bits).T.contiguous()
        rows, bias = rows_of(packed, k, bits), self.bias_of(tensors, n)
        return PackedLinear(rows, scales.contiguous(), zeros, k, size, bias, bits=bits)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        schemes: dict[tuple[int, int], list[str]] = {}
        for name, facts in summary.layers.items():
            size = -1 if facts.groups == 1 else facts.group_size
            schemes.setdefault((size, facts.bits), []).append(name)
        groups = {}
        for index, ((size, bits), names) in enumerate(schemes.items()):
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": summary.symmetric,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "actorder": None,
            }
            groups[f"group_{index}"] = {
                # vLLM's output layer is of another class than Linear, and found by its name alone
                "targets": ["Linear", *summary.called(summary.heads)] if len(schemes) == 1 else summary.called(names),
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": summary.called(summary.float_linears),
        }

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method") != "compressed-tensors":
            return None
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()) or not groups:
            raise CheckpointError("quantization_config: config_groups is missing or damaged")
        require_known(config, _KNOWN)
        _refuse_transforms(config.get("transform_config"))
        _refuse_rounded_activations(groups)
        rules = [_rule_of(name, group, config.get("format")) for name, group in groups.items()]
        readable = [rule for rule in rules if not rule.problem]
        if not readable:
            raise CheckpointError(f"quantization_config: {rules[0].problem}")
        sizes = tuple(dict.fromkeys(rule.group_size for rule in readable))
        left = [
            Rule(
                _fits(target),
                problem=f"the config leaves it float (ignore: {target!r}), but the files hold it quantized",
            )
            for target in _strings(config.get("ignore"), "ignore")
        ]
        several = _by_target(groups.values(), rules) if len(rules) > 1 else []
        widths = {rule.bits for rule in readable}
        problem = "" if len(widths) == 1 else "no target of config_groups fits it, and the groups have different bits"
        return Settings(sizes, rules=(*left, *several), problem=problem, width=min(widths))


def _by_target(groups: Iterable[Mapping[str, Any]], rules: Iterable[Rule]) -> list[Rule]:
    """Make a rule of each target, in the order in which compressed-tensors looks: names, patterns, classes of modules.

    Which class a layer had is not told: it is taken for a Linear where no other class is spoken of.
    """
    targets = [
        (target, rule)
        for group, rule in zip(groups, rules, strict=True)
        for target in _strings(group.get("targets"), "targets")
    ]
    patterns = [(target, rule) for target, rule in targets if target.startswith("re:")]
    names = [(target, rule) for target, rule in targets if not target.startswith("re:")]
    classes = [(target, rule) for target, rule in names if "." not in target and target[:1].isupper()]
    found = [replace(rule, fits=_fits(target)) for target, rule in (*names, *patterns)]
    if len(classes) == 1 and classes[0][0] == "Linear":
        found.append(replace(classes[0][1], fits=lambda name: True))
    return found


def _fits(target: str) -> Any:
    return regex(target[3:], f"{target!r}") if target.startswith("re:") else lambda name: name == target


def _strings(value: Any, place: str) -> list[str]:
    """Check a list of names and patterns; CheckpointError for anything else."""
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise CheckpointError(f"quantization_config: {place}={value!r} is no list of names")
    return value


def _refuse_transforms(config: Any) -> None:
    """Raise CheckpointError for transforms at run time, and for what tells no place; those of weights are in the weights."""
    if not config:
        return
    place = "quantization_config: transform_config"
    try:
        applied = [
            (name, scheme.get("type"), each["location"])
            for name, scheme in config["config_groups"].items()
            for each in scheme["apply"]
        ]
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{place}={config!r} is damaged, or of another version") from None
    for name, kind, location in applied:
        if location not in _OFFLINE:
            raise CheckpointError(
                f"{place}: {name!r} applies a {kind} transform at location={location!r} while the model runs, which awq_ext "
                "does not do"
            )


def _refuse_rounded_activations(groups: Mapping[str, Any]) -> None:
    """Raise CheckpointError for groups without weights that round activations: their modules have nothing in the files."""
    for name, group in groups.items():
        rounded = group.get("input_activations") or group.get("output_activations")
        if rounded and group.get("weights") is None:
            raise CheckpointError(
                f"quantization_config: config_groups[{name!r}] rounds activations of {group.get('targets')} while the "
                f"model runs ({rounded!r}), which awq_ext does not do"
            )


def _rule_of(name: str, group: Mapping[str, Any], format: Any) -> Rule:
    """Read one of config_groups; what cannot be read is the problem of the layers in it."""
    place = f"config_groups[{name!r}]"
    try:
        size, bits = _scheme(group, format, place)
        return Rule(lambda name: True, size, bits=bits)
    except CheckpointError as error:
        return Rule(lambda name: True, problem=str(error).removeprefix("quantization_config: "))


def _scheme(group: Mapping[str, Any], format: Any, place: str) -> tuple[int, int]:
    """Read group size and bits of one of config_groups; CheckpointError where they cannot be run."""
    weights, format = group.get("weights"), group.get("format") or format
    if format != "pack-quantized":
        raise CheckpointError(f"{place}: format {format!r}; pack-quantized can be read")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{place}: weights={weights!r}, an object is needed")
    bits = 4 if (said := int_setting(weights, "num_bits")) is None else said
    if bits not in CompressedTensors.widths:
        raise CheckpointError(f"{place}: it has {bits} bits; of this format awq_ext reads 4 or 8")
    if weights.get("type", "int") != "int" or group.get("input_activations") is not None:
        raise CheckpointError(f"{place}: only int4 and int8 weights with float activations can be read")
    require_known(group, _KNOWN_OF_GROUP, place)
    require_known(weights, _KNOWN_OF_WEIGHTS, f"{place}.weights")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{place}: strategy={strategy!r}; group and channel can be read")
    return (-1 if strategy == "channel" else checked_group_size(int_setting(weights, "group_size"))), bits
