"""Names of settings: former ones and those of AutoAWQ are translated, mistyped ones are answered with the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..reporting.warn import warn
from .effort import effort_fields

# What other tools call a field: named in the answer, but not translated, as their values may mean something else.
_ELSEWHERE = {
    "wbits": "bits",
    "nbits": "bits",
    "num_bits": "bits",
    "groupsize": "group_size",
    "sym": "symmetric",
    "asym": "symmetric",
    "desc_act": "act_order",
    "damp_percent": "damping",
    "dampening_frac": "damping",
    "ignore": "skip",
    "exclude": "skip",
    "targets": "only",
    "include": "only",
    "dynamic": "per_layer",
    "lm_head": "head",
    "quant_lm_head": "head",
    "quantize_lm_head": "head",
    "seqlen": "seq_len",
    "max_seq_length": "seq_len",
    "n_samples": "calib_loader, which decides how many samples there are",
    "nsamples": "calib_loader, which decides how many samples there are",
    "max_calib_samples": "max_calib_tokens",
    "max_calib_seq_len": "seq_len",
}
# AutoAWQ's version -> the name of the layout of files, None for what save_pretrained writes unasked.
_VERSIONS = {"gemm": None, "exllama": None, "ipex": None, "marlin": None, "gemv": "gemv", "gemv_fast": "gemv_fast"}
_AUTOAWQ = ("w_bit", "q_group_size", "zero_point", "modules_to_not_convert", "version", "quant_method")
_FORMER = ("quantize_head",)
# Of quantize, beside the fields: a mistyped one of them arrives here too.
_ARGUMENTS = ("tokenizer", "inputs", "blocks", "progress", "resume", "fresh", "distributed", "timeout")


def read_fields(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Translate AutoAWQ's and former names of settings; TypeError for a name that is neither, with the nearest that is known.

    w_bit is bits, q_group_size is group_size, zero_point is the opposite of symmetric, modules_to_not_convert lists parts of names
    to skip. version names a layout of files, which is chosen when saving: any but GEMM brings a warning that says how.
    quantize_head, as head was called when it had two values, is head="int4" where it is True. effort stands for several fields,
    any of which may be given beside it and then counts; only where all are given (``dataclasses.replace``) the effort does.
    """
    known, fields = list(known), {}
    if "effort" in given:
        given = dict(given)
        chosen = effort_fields(given.pop("effort"))
        rest = read_fields(given, known)
        return {**rest, **chosen} if rest.keys() >= set(known) else {**chosen, **rest}
    for name, value in given.items():
        pair = _translated(name, value) if name in (*_AUTOAWQ, *_FORMER) else {name: value}
        for ours, translated in pair.items():
            if ours not in known:
                raise TypeError(unknown_field(ours, value, known))
            if ours in fields or (ours != name and ours in given):
                raise TypeError(f"AwqConfig: {name}={value!r} sets {ours}, which is given too: leave one out")
            fields[ours] = translated
    return fields


def _translated(name: str, value: Any) -> dict[str, Any]:
    if name == "w_bit":
        return {"bits": value}
    if name == "q_group_size":
        return {"group_size": value}
    if name == "zero_point":
        if not isinstance(value, bool):
            raise TypeError(f"AwqConfig: zero_point={value!r}: True (asymmetric) or False (symmetric) is needed")
        return {"symmetric": not value}
    if name == "modules_to_not_convert":
        parts = [value] if isinstance(value, str) else value or []
        return {"skip": tuple(f"*{part}*" for part in parts)}
    if name == "quantize_head":
        if not isinstance(value, bool):
            raise ValueError(f"AwqConfig: quantize_head={value!r}: choose one of True, False, or use head=")
        return {"head": "int4" if value else "float"}
    if name == "quant_method":
        if value != "awq":
            raise TypeError(f"AwqConfig: quant_method={value!r} is the config of another method than AWQ")
        return {}
    _check_version(value)
    return {}


def _check_version(value: Any) -> None:
    layout = str(value).lower()
    if layout not in _VERSIONS:
        raise TypeError(f"AwqConfig: version={value!r}: AutoAWQ has {', '.join(map(str.upper, _VERSIONS))}")
    if (format := _VERSIONS[layout]) is not None:
        warn(
            f"version={value!r} is a layout of files, which is chosen when saving: "
            f'awq_ext.save_pretrained(model, directory, format="{format}")'
        )


def unknown_field(name: str, value: Any, known: Iterable[str]) -> str:
    """Say that AwqConfig has no such field, and which one may be meant."""
    if name == "format":
        return (
            f"AwqConfig has no field format (given format={value!r}): the format of files is chosen when the model is saved, "
            f"awq_ext.save_pretrained(model, directory, format={value!r})"
        )
    known = sorted({*known, "effort"})  # which is understood beside the fields
    meant = [*known, *_ARGUMENTS]
    near = [_ELSEWHERE[name.lower()]] if name.lower() in _ELSEWHERE else difflib.get_close_matches(name, meant, 2)
    shown = text if len(text := repr(value)) <= 60 else f"a {type(value).__name__}"  # a tokenizer's is pages long
    says = f"AwqConfig has no field {name} (given {name}={shown})"
    if name in _ARGUMENTS:
        return f"{says}: it is an argument of awq_ext.quantize, no setting"
    return says + did_you_mean(near) if near else f"{says}; its fields are {', '.join(known)}"


def nearest_choice(word: str, known: Iterable[str]) -> list[str]:
    """Find which of the known words was meant; none where none is near."""
    known = list(known)
    # gptq+awq has all letters of gptq, but means awq+gptq
    same = [one for one in known if sorted(one.split("+")) == sorted(word.split("+"))]
    return same or difflib.get_close_matches(word, known, 1)


def did_you_mean(near: Sequence[str]) -> str:
    """Ask for the names that may have been meant, as the end of an error about one that there is not; "" for none."""
    *others, last = near or [""]
    return f": did you mean {' or '.join(part for part in (', '.join(others), last) if part)}?" if last else ""
