"""Calibration without a data set: a small mix of texts that ships with the package, beside what the model writes itself.

``texts/`` holds prose, letters, instructions, dialogues and mathematics in English; code, data and tool calls; and seventeen other
languages. All of it was written for this package, and is licensed as the package is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

from ..config import AwqConfig

BUILTIN = "builtin"
FILES = ("english.txt", "code.txt", "languages.txt")
# Batches of its own text to one of the built-in mix, which is short, and in fewer languages than many models know.
WRITTEN = 1.0


def builtin_text() -> str:
    """Read the whole mix: about 24 KB."""
    return "\n".join(resources.files(__package__).joinpath("texts", name).read_text(encoding="utf-8") for name in FILES)


def is_builtin(samples: Any) -> bool:
    """Tell whether calibration samples are asked for by the name of the built-in mix."""
    return isinstance(samples, str) and samples == BUILTIN


def builtin_calibration(tokenizer: Callable[..., Any] | None, config: AwqConfig) -> tuple[list[str], AwqConfig]:
    """Return the built-in mix as samples, and settings by which the model adds text of its own, unless they say how much.

    TypeError without a tokenizer.
    """
    if tokenizer is None:
        raise TypeError(f'calib_loader="{BUILTIN}" is a text: pass tokenizer= to turn it into tokens')
    written = WRITTEN if config.generated_tokens is None else config.generated_tokens
    return [builtin_text()], replace(config, generated_tokens=written)
