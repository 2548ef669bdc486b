"""Calibration without a data set: a small mix of texts that ships with the package.

``texts/`` holds prose, letters, instructions, dialogues and mathematics in English; code, data and tool calls; and seventeen other
languages. All of it was written for this package, and is licensed as the package is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any, NamedTuple

from ..config import AwqConfig
from ..forwards.calls import Call
from ..forwards.samples import token_ids
from .windows import at_most, count_tokens, ids_of, place_of_ids

BUILTIN = "builtin"
FILES = ("english.txt", "code.txt", "languages.txt")
# Of other text there is none beside the mix, unless the settings say how much: it takes time and gains a point at most
# (docs/research-notes-tuning.md, "The built-in texts").
NOTHING_ELSE = {"generated_tokens": 0.0, "random_tokens": 0.0}
# Tokens in a window of the mix, at most. Windows of 512 tokens in place of 256 take longer, and gain nothing.
WINDOW = 256
_HINT = " It is one of the built-in texts: builtin_text=False leaves them out."
NO_TOKENIZER = (
    "calibrated without the texts that ship with the package (builtin_text=True, which every effort sets), as no tokenizer was "
    "given: pass tokenizer=, or builtin_text=False to do without them"
)


def builtin_text() -> str:
    """Read the whole mix: about 36 KB."""
    return "\n".join(resources.files(__package__).joinpath("texts", name).read_text(encoding="utf-8") for name in FILES)


def is_builtin(samples: Any) -> bool:
    """Tell whether calibration samples are asked for by the name of the built-in mix."""
    return isinstance(samples, str) and samples == BUILTIN


def builtin_calibration(tokenizer: Callable[..., Any] | None, config: AwqConfig) -> tuple[list[str], AwqConfig]:
    """Return the built-in mix as samples, and settings by which it is all there is, unless they say otherwise.

    TypeError without a tokenizer.
    """
    if tokenizer is None:
        raise TypeError(f'calib_loader="{BUILTIN}" is a text: pass tokenizer= to turn it into tokens')
    unsaid = {name: share for name, share in NOTHING_ELSE.items() if getattr(config, name) is None}
    return [builtin_text()], replace(config, builtin_text=False, **unsaid)


class Mix(NamedTuple):
    """What becomes of ``config.builtin_text``: calls of the mix, and the settings, which deny it where it takes no part.

    note, warning: why it takes none; a warning where the caller can change that. Otherwise "".
    """

    calls: list[Call]
    config: AwqConfig
    note: str = ""
    warning: str = ""


def builtin_calls(config: AwqConfig, given: Sequence[Call], tokenizer: Callable[..., Any] | None) -> Mix:
    """Make calls of the mix, a window of up to ``WINDOW`` tokens each, that are like the calls ``given``.

    There are none beside batches that hold more than token ids, and without a tokenizer. Of ``config.max_calib_tokens`` they take
    half, or what is left of it where less is given.
    """
    if not config.builtin_text:
        return Mix([], config)
    names, without = {place_of_ids(call) for call in given}, replace(config, builtin_text=False)
    if None in names or len(names) > 1:
        held = "the calibration batches are not token ids alone"
        return Mix([], without, note=f"the built-in texts took no part in the calibration: {held}")
    if tokenizer is None:
        return Mix([], without, warning=NO_TOKENIZER)
    ids = token_ids(tokenizer, builtin_text())
    length = min(config.seq_len, WINDOW)
    whole = ids[: max(len(ids) // length, 1) * length]
    rows = [part[None].to(ids_of(given[0])) for part in whole.split(length)]
    name = names.pop()
    calls = [Call(() if name else (row,), {name: row} if name else {}, _HINT) for row in rows]
    most = config.max_calib_tokens
    # 0 would be no limit
    return Mix(at_most(calls, max(most // 2, most - count_tokens(given), 1) if most else 0), config)
