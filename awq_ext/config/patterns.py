"""Patterns of layer names: fnmatch, or regular expressions after ``re:``; and what one that fits nothing may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

REGEX = "re:"


def fits(pattern: str, name: str) -> bool:
    """Tell whether a pattern fits a whole name: ``layers.0.*`` as fnmatch does, ``re:layers\\.[01]\\..*`` as re.fullmatch does."""
    if pattern.startswith(REGEX):
        return _compiled(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a regular expression that is none."""
    if pattern.startswith(REGEX):
        try:
            _compiled(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.removeprefix(REGEX))


def suggested(pattern: str, names: Sequence[str], most: int = 3) -> list[str]:
    """Suggest patterns that fit some of ``names`` for one that fits none, or else the names most like it, up to ``most``.

    None where no name is like it.
    """
    wider = [one for one in _wider(pattern) if any(fits(one, name) for name in names)]
    if wider:
        return wider[:1]
    if pattern.startswith(REGEX):
        pattern = re.sub(r"\\?\.\*|\\|[$^]", "", pattern.removeprefix(REGEX))
    elif (mended := _mended(pattern, names)) is not None:
        return [mended]
    return difflib.get_close_matches(pattern, names, most)


def _wider(pattern: str) -> Iterable[str]:
    """Yield patterns for all below a module of this name, for the last part of a name, and for any part of it."""
    if pattern.startswith(REGEX):
        yield from (f"{pattern}\\..*", f"{pattern}.*", f"re:.*{pattern.removeprefix(REGEX)}.*")
    else:
        yield from (f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*", f"*{pattern}", f"*{pattern}*")


def _mended(pattern: str, names: Iterable[str]) -> str | None:
    """Replace each mistyped part between dots by the nearest there is; None where that does not make the pattern fit."""
    names = list(names)
    parts = sorted({part for name in names for part in name.split(".")})
    mended = [
        part if "*" in part or part in parts else next(iter(difflib.get_close_matches(part, parts, 1)), part)
        for part in pattern.split(".")
    ]
    joined = ".".join(mended)
    return joined if any(fits(joined, name) for name in names) else None
