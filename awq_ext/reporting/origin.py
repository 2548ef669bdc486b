"""Tell where a quantized model comes from: the call or command, and the versions of what ran."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = {"awq-ext": "awq_ext", "torch": "torch", "transformers": "transformers"}


def versions() -> dict[str, str]:
    """Look up the versions of awq_ext, torch and, where it is installed, transformers."""
    found = {}
    for distribution, name in _PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """Tell the time in UTC, to the second, as ISO 8601 has it: ``2025-03-01T12:30:00+00:00``."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def call_text(config: Mapping[str, Any], usual: Mapping[str, Any], tokenizer: bool = False) -> str:
    """Write the call of quantize() that has the settings ``config``; those that are as ``usual`` go without saying.

    tokenizer: whether the call had one.
    """
    chosen = {name: value for name, value in config.items() if value != usual.get(name)}
    arguments = "".join(
        f", {name}={tuple(value) if isinstance(value, list) else value!r}" for name, value in chosen.items()
    )
    return f"awq_ext.quantize(model, calibration{', tokenizer=tokenizer' if tokenizer else ''}{arguments})"


def command_text(words: Iterable[str]) -> str:
    """Write a command as it can be typed, absolute paths by their last part: a report is for others to read, too."""
    return shlex.join(map(_without_folders, words))


def _without_folders(word: str) -> str:
    name, equals, path = word.rpartition("=")  # NAME=PATH, of a text
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() and Path(path).name else word
