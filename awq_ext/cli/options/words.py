"""Messages of the package in the words of the command line: the arguments that they name become options."""

from __future__ import annotations

import re

# arguments that have an option of their own; all other fields are given by --set
_OPTIONS = ("bits", "dtype", "format", "group_size", "head", "method")
_SET = ("fold", "packed", "scale_dtype", "symmetric")
_NAMES = "|".join((*_OPTIONS, *_SET))
_VALUE = r'"[\w+-]+"(?:(?:, | or |, or )"[\w+-]+")*|True|False|-?\d+'
# not within a call or a list of its arguments, nor what is an option already, nor a field of a class
_ARGUMENT = re.compile(rf"(?<![\w.(\[-])(?<!--set )(?<![\w\"'], )({_NAMES})=({_VALUE})(?![\w\"'])")
_FLAGS = {
    re.compile(r"(?<![\w(])(?<!, )overwrite=True\b"): "--overwrite",
    re.compile(r"\bskip=(?=[\s,;:.)]|$)"): "--skip",
}


def in_options(text: str) -> str:
    """Write ``scale_dtype="float16"`` as ``--set scale_dtype=float16``, ``group_size=32`` as ``--group-size 32``, and the like."""
    for flag, option in _FLAGS.items():
        text = flag.sub(option, text)
    return _ARGUMENT.sub(_option, text)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2].replace('"', "")
    value = value.lower() if value in ("True", "False") else value
    return f"--{name.replace('_', '-')} {value}" if name in _OPTIONS else f"--set {name}={value}"
