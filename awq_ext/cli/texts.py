"""Read the texts of files, and cut windows of tokens from them."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibration.builtin import BUILTIN, builtin_text
from ..forwards.samples import text_of

T = TypeVar("T")
PLAIN = (".txt", ".text", ".md", ".rst", ".py")
SUFFIXES = (*PLAIN, ".jsonl", ".json", ".csv", ".parquet")
# Characters: so much of a text is enough for a number of tokens, without tokenizing all of a large file.
_LONGEST_TOKEN = 24


def read_text(path: Path, tokenizer: Any, field: str | None = None) -> str:
    """Read the text of a file: all of a plain one, or that of all rows, one after another.

    A row is a text, a chat, or holds one under ``field`` (see ``forwards.samples.text_of``), which plain texts among others do
    without. ValueError for a file of another kind.
    """
    if is_builtin(path):
        return builtin_text()
    suffix = path.suffix.lower()
    if suffix in PLAIN:
        return _content(path)
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: what is in a {suffix or 'file without a suffix'} is not known: {', '.join(SUFFIXES)} are read "
            "(rename plain text to .txt)"
        )
    rows = {".jsonl": _lines, ".json": _list, ".csv": _table, ".parquet": _parquet}[suffix](path)
    return "\n".join(text_of(row, tokenizer, place, field)[0] for place, row in rows)


def is_builtin(path: Path) -> bool:
    """Tell whether a path is no file, but the name of the texts that ship with the package."""
    return str(path) == BUILTIN and not path.exists()


def check_field(field: str | None, paths: Iterable[Path]) -> None:
    """Raise ValueError for a field where all files are plain text, which has none."""
    if field is not None and all(path.suffix.lower() in PLAIN or is_builtin(path) for path in paths):
        raise ValueError(f"--field {field}: no file has fields, as all are plain text ({', '.join(PLAIN)})")


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    # not splitlines(), which also ends a line where JSON may hold a character such as U+2028
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _json(line, f"{path}, line {number}")


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _json(_content(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}: a list of rows is needed")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as file:
        try:
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(csv.DictReader(file), 1))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise ImportError(f"{path}: .parquet files need pyarrow: pip install pyarrow") from error
    try:
        rows = read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def windows(paths: Sequence[Path], tokenizer: Any, count: int, length: int, field: str | None = None) -> list[Tensor]:
    """Cut up to ``count`` windows int64 [1, length] from the beginnings of texts, as many of one as of another."""
    each = -(-count // len(paths))
    found = []
    for path in paths:
        text = read_text(path, tokenizer, field)[: each * length * _LONGEST_TOKEN]
        found += list(_whole(text, tokenizer, length, path)[:each].split(1))
    return found[:count]


def windows_of(
    named: Mapping[str, Path], tokenizer: Any, tokens: int, length: int, field: str | None = None
) -> dict[str, list[Tensor]]:
    """Cut windows int64 [1, length] with about ``tokens`` in all from the beginning of each text, by its name."""
    return {name: windows([path], tokenizer, -(-tokens // length), length, field) for name, path in named.items()}


def drawn_windows(
    paths: Sequence[Path], tokenizer: Any, count: int, length: int, field: str | None = None, seed: int = 0
) -> list[Tensor]:
    """Draw up to ``count`` windows int64 [1, length] from all of the texts, as many of one as of another.

    Each text is cut into as many stretches as it gives windows, and one place is drawn in each, so that no part of it is left out.
    """
    return drawn_and_left(paths, tokenizer, count, length, field, seed)[0]


def drawn_and_left(
    paths: Sequence[Path],
    tokenizer: Any,
    count: int,
    length: int,
    field: str | None = None,
    seed: int = 0,
    left: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw windows as :func:`drawn_windows` does, and up to ``left`` others from between them, which share no token with them.

    A text that is all drawn leaves none.
    """
    each, each_left = -(-count // len(paths)), -(-left // len(paths))
    found: list[Tensor] = []
    others: list[Tensor] = []
    for number, path in enumerate(paths):
        text = read_text(path, tokenizer, field)
        places = random.Random(f"{seed} {number}")
        room = length * _LONGEST_TOKEN
        if len(text) > 4 * each * room:  # too much to tokenize: windows begin at places in the text instead
            begins = _draw(len(text) - room, each, places)
            gaps = [(one + room, other - room) for one, other in itertools.pairwise(begins) if other - one >= 2 * room]
            between = [(begin + end) // 2 for begin, end in _evenly(gaps, each_left)]
            for place, windows in [(begin, found) for begin in begins] + [(begin, others) for begin in between]:
                windows.append(_whole(_from_word(text, place, room), tokenizer, length, path)[:1])
        else:
            whole = _whole(text, tokenizer, length, path)
            chosen = _draw(len(whole), min(each, len(whole)), places)
            found += [whole[i : i + 1] for i in chosen]
            others += [whole[i : i + 1] for i in _evenly(sorted({*range(len(whole))} - {*chosen}), each_left)]
    return found[:count], [one for one in others if not any(torch.equal(one, seen) for seen in found)][:left]


def _evenly(items: Sequence[T], count: int) -> list[T]:
    """Take up to ``count`` of items, spread over all of them."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _draw(size: int, count: int, places: random.Random) -> list[int]:
    """Draw one of each of ``count`` equal stretches of range(size)."""
    edges = [size * i // count for i in range(count + 1)]
    return [places.randrange(begin, end) for begin, end in itertools.pairwise(edges)]


def _from_word(text: str, begin: int, room: int) -> str:
    """Take ``room`` characters, from the first space on if there is one."""
    part = text[begin : begin + room]
    return part[max(part.find(" "), 0) :] if begin else part


def _whole(text: str, tokenizer: Any, length: int, path: Path) -> Tensor:
    """Tokenize a text into whole windows int64 [n, length]; ValueError for less than one."""
    # without truncation the tokenizer warns of more tokens than the model takes at once: here they are cut
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0].to(torch.int64)
    whole = ids[: len(ids) // length * length].view(-1, length)
    if len(whole) == 0:
        shorter = ", or a smaller --seq-len" if len(ids) >= length // 8 else ""
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {length}: give more text{shorter}")
    return whole
