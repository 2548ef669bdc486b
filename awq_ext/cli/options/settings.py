"""Fields of AwqConfig, read from options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from .checks import checked
from .words import in_options


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``clip=false`` to ("clip", False): the value is JSON or a word. A usage error unless it is FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE, such as clip=false")
    try:
        return name, json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except ValueError:
        return name, value  # a word, such as auto


def parse_method(text: str) -> dict[str, Any]:
    """Parse ``awq,clip=false,label=no clip`` to fields of AwqConfig and a label; a name may be that of an effort."""
    from ...config import EFFORTS, METHODS

    name, *fields = text.split(",")
    name = checked(name, (*METHODS, *EFFORTS), "--method")
    return {"label": text, "effort" if name in EFFORTS else "method": name} | dict(map(parse_setting, fields))


def parse_per_layer(text: str) -> dict[str, dict[str, Any]]:
    """Parse ``*.down_proj:bits=8,group_size=64``, or JSON, to fields by pattern; a usage error for anything else."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint="--per-layer") from None
        if all(isinstance(fields, dict) for fields in found.values()):
            return found
    elif split := re.fullmatch(r"(.+):([^:=]+=[^:]*)", text):  # the last colon: regular expressions hold others
        return {split[1]: dict(map(parse_setting, split[2].split(",")))}
    raise typer.BadParameter(
        f"{text!r} is not PATTERN:FIELD=VALUE, such as '*.down_proj:bits=8', nor JSON, such as "
        '\'{"*.down_proj": {"bits": 8}}\'',
        param_hint="--per-layer",
    )


def read_settings(
    fields: Mapping[str, Any],
    more: Iterable[str],
    skip: Iterable[str] = (),
    per_layer: Iterable[str] = (),
    head: str | None = None,
) -> dict[str, Any]:
    """Read fields of AwqConfig from options and ``--set``, checked before a model is loaded for nothing; else a usage error.

    fields: those that are None keep their default. per_layer: as :func:`parse_per_layer` reads it, added to that of ``more``.
    """
    from ...config import AwqConfig, understood

    more, given_by_layer = tuple(more), tuple(per_layer)
    try:
        chosen = {name: value for name, value in fields.items() if value is not None}
        chosen |= understood(dict(map(parse_setting, more)))
        for given in map(parse_per_layer, given_by_layer):
            before = chosen.get("per_layer", {})
            chosen["per_layer"] = {**before, **{name: {**before.get(name, {}), **given[name]} for name in given}}
        if head is not None:
            if "head" in chosen:
                raise ValueError(f"--head {head} sets head, which --set gives too ({chosen['head']}): leave one out")
            chosen["head"] = head
        if skip := tuple(skip):
            chosen["skip"] = (*AwqConfig.from_dict(chosen).skip, *skip)
        AwqConfig.from_dict(chosen)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            in_options(str(error)), param_hint=_option(str(error), fields, more, given_by_layer)
        ) from None
    return chosen


def _option(error: str, fields: Mapping[str, Any], more: Iterable[str], per_layer: Sequence[str]) -> str:
    """Name the option that gave what an error of AwqConfig is about."""
    name = (re.match(r"AwqConfig\.(\w+)", error) or ["", ""])[1]
    if per_layer and name == "per_layer":
        return "--per-layer"
    by_option = fields.get(name) is not None and name not in (parse_setting(text)[0] for text in more)
    return f"--{name.replace('_', '-')}" if by_option else "--set"


def made_symmetric(chosen: dict[str, Any], bits: tuple[int, ...]) -> bool:
    """Make layers of these ``bits`` symmetric where nothing says what they are to be; tell whether there are any."""
    if "symmetric" in chosen:
        return False
    rest = {name: fields for name, fields in chosen.get("per_layer", {}).items() if fields.get("bits") in bits}
    made = [fields for fields in rest.values() if fields.setdefault("symmetric", True)]
    if (chosen.get("bits") or 4) in bits:
        chosen["symmetric"] = True
        made.append(chosen)
    elif chosen.get("head") == "int8" and 8 in bits:
        head = {"symmetric": True, **chosen.get("per_layer", {}).get("lm_head", {})}
        chosen["per_layer"] = {**chosen.get("per_layer", {}), "lm_head": head}
        made.append(head)
    return bool(made)


def with_builtin(calib: Iterable[Path], chosen: dict[str, Any]) -> dict[str, Any]:
    """Let the built-in texts, where they are given, be all that is added to other text, unless the settings say otherwise."""
    from ...calibration.builtin import NOTHING_ELSE
    from ..texts import is_builtin

    return {**NOTHING_ELSE, "builtin_text": False, **chosen} if any(map(is_builtin, calib)) else chosen


def refuse_effort_of_rtn(chosen: Mapping[str, Any]) -> None:
    """Refuse an effort where every layer is rounded to nearest; a usage error."""
    methods = {chosen.get("method"), *(fields.get("method", "rtn") for fields in chosen.get("per_layer", {}).values())}
    if chosen.get("effort") is not None and methods == {"rtn"}:
        raise typer.BadParameter(
            f"{chosen['effort']} says how long codes are searched, and the method rtn searches none: leave one of them out",
            param_hint="--effort",
        )


def refuse_other_bits(settings: list[str], bits: int | None) -> None:
    """Say where to try what no quantized directory can hold: other bits, and weights that are only rounded."""
    from ...config import understood

    try:
        asked = ({} if bits is None else {"bits": bits}) | understood(dict(map(parse_setting, settings)))
    except TypeError:
        return  # read_settings says what is wrong
    if asked.get("packed") is False or asked.get("bits", 4) in (2, 3, 5, 6, 7):
        hint, bits = "--set" if bits is None else "--bits", asked.get("bits", 4)
        raise typer.BadParameter(
            f"directories hold 4 or 8 bits, packed. What {bits} bits cost: awq-ext compare MODEL --calib ... --traffic ... "
            f"--set bits={bits} --set packed=false. The weights rounded to {bits} bits as a float model, no smaller: in Python "
            f"awq_ext.quantize(model, calib, bits={bits}, packed=False), then model.save_pretrained(OUT). "
            'Some layers at 8 bits: --format compressed-tensors --set \'per_layer={"*.down_proj": {"bits": 8}}\'',
            param_hint=hint,
        )
