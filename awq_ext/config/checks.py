"""Check the values of AwqConfig's fields, one by one; each error names field, value and choices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..kernels.reference import TILE_BITS
from .effort import EFFORTS
from .patterns import check_pattern

GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
METHODS = ("awq", "rtn", "gptq", "awq+gptq")
HEADS = ("float", "int8", "int4")
# What ``skip`` had by default before ``head``, and what people write out of habit: nothing needs to be fitted by them.
FORMER_SKIP = ("lm_head", "*.lm_head", "*lm_head", "re:lm_head", "re:.*lm_head", "re:.*lm_head$", "<output embeddings>")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "group_size": GROUP_SIZES,
    "symmetric": (False, True),
    "scale_dtype": tuple(SCALE_DTYPES),
    "clip": ("auto", True, False),
    "act_order": (True, False),
    "fold": ("auto", "always", "never"),
    "propagate": ("float", "quantized"),
    "objective": (None, "layer", "model"),
    "bias_correction": (True, False),
    "packed": (True, False),
    "head": HEADS,
    "builtin_text": (False, True),
}
_SMALLEST = {
    "n_grid": 1,
    "search_rows": 0,
    "refine": 0,
    "weighed_batches": 0,
    "max_calib_tokens": 0,
    "learn_rounding": 0,
    "tune_scales": 0,
    "seq_len": 2,
    "min_tokens": 0,
    "min_weights": 0,
}
# What 0 stands for, where one may expect -1 for it.
_ZERO = {"search_rows": "all", "weighed_batches": "all", "max_calib_tokens": "no limit"}


def check_values(config: Any) -> None:
    """Raise TypeError or ValueError for a field that is no number or choice of those it can have."""
    for name in ("bits", "group_size", *_SMALLEST):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"AwqConfig.{name}={value!r}: an int is needed, not {type(value).__name__}")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        # 1 == True in Python; a flag must be a real bool, a number must not be one
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            meant = f'; an effort is given as effort="{value}"' if name == "method" and value in list(EFFORTS) else ""
            raise ValueError(f"AwqConfig.{name}={value!r}: choose one of {', '.join(map(repr, choices))}{meant}")
    _check_ranges(config)


def _check_ranges(config: Any) -> None:
    if config.packed and config.bits not in TILE_BITS:
        raise ValueError(
            f"AwqConfig.bits={config.bits}: packed layers hold 4 or 8 bits; use one of them, or packed=False to try 2 to 8"
        )
    if not 2 <= config.bits <= 8:
        raise ValueError(f"AwqConfig.bits={config.bits}: 2 to 8 are possible")
    for name, smallest in _SMALLEST.items():
        if getattr(config, name) < smallest:
            zero = f"; 0 is {_ZERO[name]}" if name in _ZERO else ""
            raise ValueError(f"AwqConfig.{name}={getattr(config, name)}: at least {smallest} is needed{zero}")
    if not 0 < _number(config, "damping") < float("inf"):
        raise ValueError(f"AwqConfig.damping={config.damping}: a positive number is needed")
    for name in ("random_tokens", "generated_tokens"):
        if (value := getattr(config, name)) is not None and not 0 <= _number(config, name) < float("inf"):
            raise ValueError(f"AwqConfig.{name}={value}: a number from 0, or None, is needed")


def _number(config: Any, name: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"AwqConfig.{name}={value!r}: a float is needed, not {type(value).__name__}")
    return value


def checked_selectors(name: str, value: Any) -> tuple[Any, ...]:
    """Return the patterns and functions of a field as a tuple; TypeError for anything else, ValueError for a broken pattern."""
    unusable = isinstance(value, str) or not isinstance(value, Iterable)
    if unusable or not all(isinstance(one, str) or callable(one) for one in value):
        raise TypeError(
            f"AwqConfig.{name}={value!r}: give a tuple of name patterns, such as ('*.router',), or functions of "
            "(name, module)"
        )
    for one in value:
        try:
            check_pattern(one if isinstance(one, str) else "")
        except ValueError as error:
            raise ValueError(f"AwqConfig.{name}: {error}") from None
    return tuple(value)
