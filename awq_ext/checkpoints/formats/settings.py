"""Read what a quantization_config says: settings of layers (Settings), and nothing that is not known (require_known)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...kernels.reference import group_count
from .in_memory import InMemory
from .packed import CheckpointError

_LARGEST_GROUP = 2**31 - 1
_MOST_WAYS = 10**8  # of sharing a name out among the repeats of a pattern: a few seconds
_SHOWN = 80  # letters of a pattern or name, in an error

Known = Mapping[str, Callable[[Any], bool]]


def anything(value: Any) -> bool:
    """Let any value pass: the entry tells how the numbers were found, or is read elsewhere."""
    return True


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Let only these values pass."""
    return lambda value: value in values


# What AutoGPTQ, GPTQModel, Optimum, AutoRound and Transformers note of how the numbers were found and which kernels ran.
HOW_IT_WAS_MADE: Known = {
    **dict.fromkeys(
        (
            "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp", "autoround_version",
            "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
            "damp_percent", "dataset", "desc_act", "disable_exllama", "do_fuse", "enable_minmax_tuning",
            "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "fuse_max_seq_len",
            "gradient_accumulate_steps", "hyb_act", "iters", "lm_head", "low_gpu_mem_usage", "lr", "max_input_length",
            "meta", "minmax_lr", "model_file_base_name", "model_name_or_path", "model_seqlen",
            "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse",
            "modules_to_not_convert", "mse", "n_samples", "nsamples", "pack_dtype", "pad_token_id", "parallel_packing",
            "provider", "quant_block_list", "regex_config", "scale_dtype", "seqlen", "static_attention_granularity",
            "static_groups", "static_kv_granularity", "supported_types", "sym", "to_quant_block_names", "tokenizer",
            "train_bs", "true_sequential", "uri", "use_cuda_fp16", "use_exllama", "use_quant_input", "v2", "v2_alpha",
            "v2_memory_device", "zero_point",
        ),
        anything,
    ),
    "act_bits": one_of(16, 32),
    "awq_gemm_checkpoint": one_of(False),
    "data_type": one_of("int", "int_sym", "int_asym"),
    "is_marlin_format": one_of(False),
}  # fmt: skip
_OF_A_PATTERN: Known = HOW_IT_WAS_MADE | {"bits": anything, "group_size": anything}


def require_known(config: Mapping[str, Any], known: Known, place: str = "quantization_config") -> None:
    """Raise CheckpointError, naming entry and value, for what is not known to leave the computation as it is.

    Only what is known passes: an entry that nobody here has heard of may rotate activations. null and empty ones are off.
    """
    for name, value in config.items():
        if value is None or value in ({}, []) or (name in known and known[name](value)):
            continue
        text = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
        raise CheckpointError(
            f"{place}: {name}={text} is not known to awq_ext, and may change what is computed (if it only tells how the "
            "numbers were found, remove the entry)"
        )


@dataclass(frozen=True)
class Rule:
    """What a config says of the layers that a pattern of its fits: group size and bits, or the problem with reading them.

    compute: what they are to compute in (``QuantLinear.compute``).
    """

    fits: Callable[[str], bool]
    group_size: int = -1
    problem: str = ""
    bits: int = 4
    compute: str = "auto"


@dataclass(frozen=True)
class Settings:
    """What a quantization_config says about its layers.

    group_sizes: the sizes that occur; a layer has the one that fits its number of groups. per_layer: name -> (in_features,
    group_size, bits) where the shapes alone do not tell. rules: the first that fits a layer's name decides; problem: with layers
    that none fits; width: their bits, and
    compute: what they are to compute in. zero_offset: added to a stored zero, modulo 2^bits; borrowed: to whole words of them, if
    the writer subtracted it from whole words, so that a zero of 0 borrowed from the next. experts, in_memory: as in Summary.
    rescaled: name -> what a QuantLinear has under this name, where that is not 1.
    """

    group_sizes: tuple[int, ...]
    per_layer: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    zero_offset: int = 0
    borrowed: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    in_memory: InMemory | None = None
    rules: tuple[Rule, ...] = ()
    problem: str = ""
    rescaled: Mapping[str, float] = field(default_factory=dict)
    width: int = 4
    compute: str = "auto"

    def of(self, name: str) -> Settings:
        """Give the settings of one layer. CheckpointError where the config says that it cannot be read."""
        if (entry := self.per_layer.get(name)) is not None:
            return replace(self, group_sizes=(entry[1],), per_layer={name: entry}, width=entry[2])
        rule = self._rule(name)
        if problem := self.problem if rule is None else rule.problem:
            raise CheckpointError(problem)
        own = replace(self, per_layer={}, rules=(), problem="")
        return (
            own if rule is None else replace(own, group_sizes=(rule.group_size,), width=rule.bits, compute=rule.compute)
        )

    def _rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.fits(name)), None)

    def bits(self, name: str) -> int:
        """Give the bits of one layer: those of its own entry, of the first rule that fits it, or the usual ones."""
        if name in self.per_layer:
            return self.per_layer[name][2]
        rule = self._rule(name)
        return self.width if rule is None else rule.bits

    def group_size(self, in_features: int, groups: int, short: bool = False) -> int:
        """Find the size that makes ``groups`` groups of ``in_features`` channels, all full unless ``short``.

        CheckpointError when none does, or several.
        """
        fitting = [
            size
            for size in self.group_sizes
            if in_features
            and group_count(in_features, size) == groups
            and (short or groups == 1 or in_features % size == 0)
        ]
        if not fitting or (groups > 1 and len(fitting) > 1):
            sizes = ", ".join(map(str, self.group_sizes))
            raise CheckpointError(f"{in_features} channels in {groups} groups do not fit the group size {sizes}")
        return fitting[0]


def with_dynamic(settings: Settings, config: Mapping[str, Any], *bits: str, widths: tuple[int, ...] = (4,)) -> Settings:
    """Add what GPTQModel's ``dynamic`` says: "-:PATTERN" leaves layers float, "+:PATTERN" or "PATTERN" gives other settings.

    The first pattern that matches from the beginning of a name decides, as there. bits: the names of the config's own
    entry; widths: which values of it can be read.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(said, (dict, type(None))) for said in dynamic.values()):
        raise CheckpointError(f"quantization_config: dynamic={dynamic!r} is not pattern -> settings")
    own = int_setting(config, *bits)
    if not dynamic and own not in (None, *widths):
        raise CheckpointError(f"quantization_config: {own} bits; of this format awq_ext reads {_either(widths)}")
    rules = tuple(_rule(key, said or {}, settings.group_sizes[0], own, widths) for key, said in dynamic.items())
    return replace(settings, rules=rules, problem=_bits_problem(own, "bits", widths), width=own or 4)


def _rule(key: str, said: Mapping[str, Any], group_size: int, usual: int | None, widths: tuple[int, ...]) -> Rule:
    place = f"dynamic[{key!r}]"
    fits = regex(key[2:] if key[:2] in ("+:", "-:") else key, place)
    if key.startswith("-:"):
        return Rule(fits, problem=f"{place} leaves it float, but the files hold it quantized")
    require_known(said, _OF_A_PATTERN, f"quantization_config: {place}")
    own = int_setting(said, "bits")
    size = checked_group_size(int_setting(said, "group_size"), group_size)
    bits = usual if own is None else own
    return Rule(fits, size, _bits_problem(bits, place, widths), bits or 4)


def _bits_problem(bits: int | None, place: str, widths: tuple[int, ...]) -> str:
    if bits in (None, *widths):
        return ""
    return f"it has {bits} bits ({place}); of this format awq_ext reads {_either(widths)}"


def _either(widths: tuple[int, ...]) -> str:
    return " or ".join(map(str, widths))


def regex(pattern: str, place: str) -> Callable[[str], bool]:
    """Compile a pattern that names must match from their beginning; CheckpointError for one that is none, or may take hours."""
    shown = f"quantization_config: {place}: {pattern[:_SHOWN]!r}"
    try:
        compiled, repeats = re.compile(pattern), _repeats(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{shown} is no pattern: {error}") from None
    if repeats is None:
        raise CheckpointError(
            f"{shown} repeats what repeats itself, for which matching may take hours: write it without"
        )

    def fits(name: str) -> bool:
        if math.comb(len(name) + repeats, repeats) > _MOST_WAYS:
            raise CheckpointError(f"{shown} has {repeats} repeats, for which matching {name[:_SHOWN]!r} may take hours")
        return compiled.match(name) is not None

    return fits


def _repeats(pattern: str) -> int | None:
    """Count the repeats of a pattern that compiles; None where one is around another, or a choice: ``(a+)+``, ``(a|b)*``.

    A name of n letters can be shared out among r repeats in about n^r / r! ways, and among nested ones in 2^n; those are what a
    match tries at worst. Escapes and classes are single letters here.
    """
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    count, open_groups = 0, [False]  # whether they hold a repeat or a choice
    held = False  # whether what was read last is a group that does
    for token in re.findall(r"\(\?[a-zA-Z<=!:#P]*|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", bare, flags=re.DOTALL):
        was_held, held = held, False
        if token.startswith("("):
            open_groups.append(False)
        elif token == ")" and len(open_groups) > 1:
            held = open_groups.pop()
            open_groups[-1] |= held
        elif token == "|":
            open_groups[-1] = True
        elif token[0] in "*+?" or (token[0] == "{" and len(token) > 2):
            if was_held and token[0] != "?":
                return None
            count += 1
            open_groups[-1] = True
    return count


def int_setting(config: Mapping[str, Any], *names: str) -> int | None:
    """Read the first of these keys that is there; CheckpointError if it is no int."""
    for name in names:
        if (value := config.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise CheckpointError(f"quantization_config: {name}={value!r} is not a whole number")
            return value
    return None


def checked_group_size(value: int | None, default: int | None = None) -> int:
    """Check that a group size can be run, and return it; CheckpointError if it cannot."""
    value = default if value is None else value
    if value is None or (value != -1 and not 1 <= value <= _LARGEST_GROUP):
        shown = value if value is None or abs(value) <= _LARGEST_GROUP else "a number of more than 31 bits"
        raise CheckpointError(f"quantization_config: group_size={shown!r}: a positive number or -1 is needed")
    return value
