"""Warn users at their own line, however deep in the package the reason is found."""

from __future__ import annotations

import sys
import warnings

# torch and contextlib too: their decorators and contexts lie between two frames of this package
_SKIPPED = (__package__.partition(".")[0], "torch", "contextlib")


def warn(text: str) -> None:
    """Issue a UserWarning that names the nearest caller outside of this package."""
    # counted rather than warnings.warn(skip_file_prefixes=...), which Python has from 3.12 on
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
