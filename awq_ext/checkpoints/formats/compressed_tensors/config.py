"""Read the quantization_config of compressed-tensors: which layers have which scheme, and which schemes can be run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..packed import CheckpointError
from ..settings import (
    Rule,
    Settings,
    anything,
    checked_group_size,
    int_setting,
    one_of,
    regex,
    require_known,
)

METHOD = "compressed-tensors"
PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"  # how it calls ways to store tensors
WIDTHS = (4, 8)
# what the activations of W8A8 are: each row (token) is rounded by its own largest value while the model runs
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_LEFT_OUT = {"num_bits": 8, "type": "int", "symmetric": True}  # what compressed-tensors takes where they are not there

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
_KNOWN_OF_ACTIVATIONS = dict.fromkeys((*TOKENS, "observer", "observer_kwargs", "scale_dtype", "zp_dtype"), anything)
_OFFLINE = ("weight_input", "weight_output")  # transforms that the stored weights have been through


def with_integers(config: Mapping[str, Any]) -> bool:
    """Tell whether any layers are stored as plain integers, as those are whose activations are rounded."""
    groups = config.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(one, dict) and (one.get("format") or config.get("format")) == INTEGERS for one in each)


def read(config: Mapping[str, Any]) -> Settings:
    """Read a config of :data:`METHOD`; CheckpointError for one that cannot be used."""
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
        Rule(_fits(target), problem=f"the config leaves it float (ignore: {target!r}), but the files hold it quantized")
        for target in _strings(config.get("ignore"), "ignore")
    ]
    several = _by_target(groups.values(), rules) if len(rules) > 1 else []
    kinds = sorted({(rule.bits, rule.compute) for rule in readable})
    problem = "" if len(kinds) == 1 else "no target of config_groups fits it, and the groups have different bits"
    width, compute = kinds[0]
    return Settings(sizes, rules=(*left, *several), problem=problem, width=width, compute=compute)


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
        size, bits, compute = _scheme(group, group.get("format") or format, place)
        return Rule(lambda name: True, size, bits=bits, compute=compute)
    except CheckpointError as error:
        return Rule(lambda name: True, problem=str(error).removeprefix("quantization_config: "))


def _scheme(group: Mapping[str, Any], format: Any, place: str) -> tuple[int, int, str]:
    """Read group size, bits and compute of one of config_groups; CheckpointError where they cannot be run."""
    weights, integers = group.get("weights"), format == INTEGERS
    if format not in (PACKED, INTEGERS):
        raise CheckpointError(f"{place}: format {format!r}; {PACKED} and {INTEGERS} can be read")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{place}: weights={weights!r}, an object is needed")
    bits = (8 if integers else 4) if (said := int_setting(weights, "num_bits")) is None else said
    if bits not in ((8,) if integers else WIDTHS):
        held = f"8, in {INTEGERS}" if integers else "4 or 8"
        raise CheckpointError(f"{place}: it has {bits} bits; of this format awq_ext reads {held}")
    if weights.get("type", "int") != "int" or not (integers or group.get("input_activations") is None):
        raise CheckpointError(f"{place}: only int4 and int8 weights with float activations can be read")
    require_known(group, _KNOWN_OF_GROUP | ({"input_activations": anything} if integers else {}), place)
    require_known(weights, _KNOWN_OF_WEIGHTS, f"{place}.weights")
    if integers:
        _require_tokens(group.get("input_activations"), f"{place}.input_activations")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{place}: strategy={strategy!r}; group and channel can be read")
    size = -1 if strategy == "channel" else checked_group_size(int_setting(weights, "group_size"))
    return size, bits, "int8" if integers else "auto"


def _require_tokens(activations: Any, place: str) -> None:
    """Raise CheckpointError for activations that are rounded otherwise than :data:`TOKENS` says, or not at all."""
    found = _LEFT_OUT | activations if isinstance(activations, dict) else {}
    if {name: found.get(name) for name in TOKENS} != TOKENS:
        raise CheckpointError(
            f"{place}={activations!r}; with {INTEGERS} weights those of W8A8 can be read: {TOKENS}, for each row by its own range"
        )
    require_known(activations, _KNOWN_OF_ACTIVATIONS, place)
