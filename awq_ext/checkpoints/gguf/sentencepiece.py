"""Describe a tokenizer.json that was made of a sentencepiece model in GGUF metadata, as llama.cpp's "llama" tokenizer.

Both join the pair of neighbours that comes first: tokenizers by the order of its merges, llama.cpp by the score of the token that
the pair becomes, and then from the left. So scores can say the same where the merges of each token follow each other, and where
no pair is missing among them that llama.cpp would join. Merges of runs (of spaces, of newlines), which Gemma's tokenizers have
first of all and mixed, are tried on runs of all lengths instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

SPACE = "\u2581"  # which stands for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTES = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
_LAST = -1e9  # the score of what no merge makes
_NEVER = 1 << 40  # the rank of a pair that is not merged


class Spaces(NamedTuple):
    """How spaces are handled: whether one is put before text, and whether always, as llama.cpp does it."""

    prefix: bool
    always: bool


class Pieces(NamedTuple):
    """What llama.cpp needs: of each token by number its text, score and type."""

    texts: list[str]
    scores: list[float]
    types: list[int]


def spaces_of(content: Mapping[str, Any]) -> Spaces | None:
    """Read normalizer and pre-tokenizer; None where they do more than to write SPACE for a space, and one before the text."""
    prefix = replaced = schemes = False
    for step in (
        *_steps(content.get("normalizer"), "normalizers"),
        *_steps(content.get("pre_tokenizer"), "pretokenizers"),
    ):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and step.get("split") is False:
            replaced, schemes = True, schemes or (step.get("prepend_scheme", "always") != "never" and not prefix)
        elif not (
            kind == "Split" and pattern == {"String": " "} and replaced
        ):  # where no space is left it does nothing
            return None
    return Spaces(prefix or schemes, not schemes) if replaced else None


def _steps(given: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    if given is None:
        return
    if given.get("type") != "Sequence":
        yield given
        return
    for part in given.get(parts) or []:
        yield from _steps(part, parts)


def pieces_of(content: Mapping[str, Any], size: int) -> Pieces | None:
    """Make texts, scores and types of ``size`` tokens; None where no scores say what the merges do."""
    model = content["model"]
    words: dict[str, int] = model["vocab"]
    if not all(f"<0x{byte:02X}>" in words for byte in range(256)):
        return None
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout")):
        return None
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks = _ranks(merges)
    if ranks is None:
        return None
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    if _joined_by_scores_alone(words, set(merges), added):
        return None
    found = Pieces([f"[PAD{i}]" for i in range(size)], [_LAST] * size, [_UNUSED] * size)
    for text, number in (*words.items(), *((text, token["id"]) for text, token in added.items())):
        found.texts[number] = text
        found.scores[number] = float(-ranks[text]) if text in ranks else 0.0 if _BYTE.fullmatch(text) else _LAST
        found.types[number] = _type(text, added.get(text), text in ranks, text == model.get("unk_token"))
    return found


def _ranks(merges: Sequence[tuple[str, str]]) -> dict[str, int] | None:
    """Number what merges make in the order in which it comes first; None where that says less than the order of merges."""
    places: dict[str, list[int]] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, []).append(place)
    torn = [text for text, found in places.items() if found[-1] - found[0] >= len(found)]
    if torn:
        letters = {text[0] for text in torn}
        among = range(min(places[text][0] for text in torn), max(places[text][-1] for text in torn) + 1)
        runs = all(text == text[0] * len(text) for text in torn)
        if not runs or any({*merges[place][0], *merges[place][1]} - letters for place in among):
            return None
        if not all(_same_runs(letter, merges, places) for letter in letters):
            return None
    return {text: number for number, text in enumerate(places)}


def _same_runs(letter: str, merges: Sequence[tuple[str, str]], places: Mapping[str, Sequence[int]]) -> bool:
    """Tell whether runs of a character are cut the same by the order of merges and by that of what they make."""
    by_merge = {(len(a), len(b)): place for place, (a, b) in enumerate(merges) if {*a, *b} == {letter}}
    by_token = {(a, b): places[letter * (a + b)][0] for a, b in by_merge}
    longest = max(a + b for a, b in by_merge)
    return all(_cut(count, by_merge) == _cut(count, by_token) for count in range(2, 2 * longest + 3))


def _cut(count: int, order: Mapping[tuple[int, int], int]) -> list[int]:
    """Join the pair that comes first, the leftmost of them, until there is none; the lengths that are left of ``count`` ones."""
    parts = [1] * count
    while len(parts) > 1:
        rank, place = min((order.get(pair, _NEVER), place) for place, pair in enumerate(pairwise(parts)))
        if rank == _NEVER:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _joined_by_scores_alone(words: Mapping[str, int], merges: set[tuple[str, str]], added: Mapping[str, Any]) -> bool:
    """Tell whether llama.cpp would join a pair that is not among the merges: two characters, or tokens, that make a token."""
    for text in words:
        if text in added or len(text) < 2 or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            whole = (len(left) == 1 or left in words) and (len(right) == 1 or right in words)
            if whole and (left, right) not in merges:
                return True
    return False


def _type(text: str, added: Mapping[str, Any] | None, made: bool, unknown: bool) -> int:
    if unknown:
        return _UNKNOWN
    if added is not None and added.get("special"):
        return _CONTROL
    # runs of spaces are printed as such only where they are ordinary tokens
    if added is not None and not (made and SPACE in text):
        return _USER_DEFINED
    return _BYTES if _BYTE.fullmatch(text) else _NORMAL
