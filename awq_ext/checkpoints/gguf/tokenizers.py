"""Describe a tokenizer.json in GGUF metadata, where llama.cpp has the same one: byte-level BPE, or of sentencepiece."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...reporting.warn import warn
from ..shards import read_json
from .architecture import gguf
from .sentencepiece import Pieces, Spaces, pieces_of, spaces_of

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _LETTERS_AND_MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST, _REST_AND_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_DIGITS, _BYTES = "each digit", "GPT-2's words"  # steps that are no pattern
_BY_THREE = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}|{_SPACES}"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    rf"|{_SPACES}",
)
# the steps that cut text into words, and whether whole words are looked up before any merge -> llama.cpp's name for that.
# Those of GPT-4o and of Mistral's Tekken have none: what llama.cpp has by their names cuts some letters outside ASCII elsewhere
_NAMES = {
    ((_BYTES,), False): "gpt-2",
    ((_DIGITS, _BYTES), False): "smollm",
    ((rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}|{_SPACES}",), False): "qwen2",
    ((rf"{_SHORT}|{_LETTERS_AND_MARKS}|\p{{N}}|{_REST_AND_MARKS}|{_SPACES}",), False): "qwen35",
    ((_BY_THREE,), True): "llama-bpe",
    ((_BY_THREE,), False): "dbrx",
    (_DEEPSEEK, False): "deepseek-v3",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def describe(folder: Path, writer: Any, config: Mapping[str, Any], tell: bool = True) -> None:
    """Add the tokenizer of ``folder`` for the model of ``config``; "none" where there is none that llama.cpp has too.

    tell: with a warning where there is one that llama.cpp has not, or not by this name, or that it follows but nearly.
    """
    path, vocabulary = folder / "tokenizer.json", config["vocab_size"]
    content = read_json(path) if path.exists() else {}
    found = _known(content, vocabulary)
    if found is None:
        if tell and content:
            warn(
                "tokenizer.json is no byte-level BPE with a pattern known here, and none of sentencepiece that scores say the "
                "same of: the GGUF file is written without a tokenizer; llama.cpp's own converter writes one "
                "(convert_hf_to_gguf.py --vocab-only)"
            )
        writer.add_tokenizer_model("none")
        return
    words, spaces, pieces = found
    writer.add_tokenizer_model("gpt2" if spaces is None else "llama")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(pieces.texts)
    writer.add_token_types(pieces.types)
    if spaces is not None:
        writer.add_token_scores(pieces.scores)
        writer.add_add_space_prefix(spaces.prefix)
    if tell and (odd := _differences(content, spaces)):
        warn(f"tokenizer.json: llama.cpp's tokens are the same but for {'; and for '.join(odd)}")
    _describe_special(folder, writer, config, content, load_merges=spaces is None)


def _known(content: dict[str, Any], vocabulary: int) -> tuple[str, Spaces | None, Pieces] | None:
    """Find llama.cpp's name for how text is cut, how spaces are handled if it is of sentencepiece, and the tokens."""
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        return None
    spaces = spaces_of(content) if model.get("byte_fallback") else None
    name = _words(content) if spaces is None else "default"
    numbers = [*model.get("vocab", {}).values(), *(one["id"] for one in content.get("added_tokens") or [])]
    if name is None or max(numbers, default=0) >= vocabulary:
        return None
    pieces = _tokens(content, vocabulary) if spaces is None else pieces_of(content, vocabulary)
    # llama.cpp ends texts at a zero, and stops at a text that comes twice
    if pieces is None or len({*pieces.texts}) < vocabulary or any("\0" in text for text in pieces.texts):
        return None
    return name, spaces, pieces


def _describe_special(
    folder: Path, writer: Any, config: Mapping[str, Any], content: Mapping[str, Any], load_merges: bool
) -> None:
    """Add merges, the chat template, and which tokens begin and end a text, and whether they are added."""
    with _quiet():
        special = gguf().SpecialVocab(folder, load_merges=load_merges, n_vocab=config["vocab_size"])
    # the package reads the config's numbers itself, but config.json is written after the GGUF file
    for kind in special.special_token_types:
        number = config.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < config["vocab_size"]:
            special.special_token_ids.setdefault(kind, number)
    if (first := _first(content)) is not None:
        special.special_token_ids["bos"], special.add_special_token["bos"] = first, True
    special.add_special_token.setdefault("bos", False)  # some kinds have it added unless told otherwise
    special.add_to_gguf(writer, quiet=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package from warning of templates that :func:`_first` reads."""
    logger = logging.getLogger("gguf.vocab")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first(content: Mapping[str, Any]) -> int | None:
    """Find the token that the tokenizer itself puts before a text; None where there is none, or more than one."""
    given = content.get("post_processor") or {}
    steps = given.get("processors", [given]) if given.get("type") == "Sequence" else [given]
    for step in steps:
        single = step.get("single") or []
        before = [part["SpecialToken"]["id"] for part in single[:-1] if "SpecialToken" in part]
        if step.get("type") == "TemplateProcessing" and len(before) == len(single) - 1 == 1:
            ids = step["special_tokens"][before[0]]["ids"]
            return ids[0] if len(ids) == 1 else None
    return None


def _differences(content: Mapping[str, Any], spaces: Spaces | None) -> list[str]:
    """Say of which texts llama.cpp makes other tokens."""
    found = []
    if spaces is not None and not spaces.always:
        found.append(
            "text that begins with a space or follows a special token: llama.cpp, as sentencepiece itself, puts a space before "
            "all text"
        )
    added = content.get("added_tokens") or []
    if strip := [one["content"] for one in added if one.get("lstrip") or one.get("rstrip") or one.get("single_word")]:
        found.append(f"spaces beside {_few(strip)}, which belong to these tokens here")
    if spaces is not None and spaces.prefix and (odd := [one["content"] for one in added if one.get("normalized")]):
        found.append(f"{_few(odd)} within a word, where this tokenizer does not look for it")
    return found


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def _words(content: dict[str, Any]) -> str | None:
    """Find llama.cpp's name for how text is cut before it is merged; None for what it may not do the same."""
    model, cut = content.get("model") or {}, content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    # composed letters are left to whoever writes the text: Qwen's tokenizers compose them, llama.cpp does not
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    *steps, last = (cut.get("pretokenizers") if cut.get("type") == "Sequence" else [cut]) or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    names = [_step(step) for step in steps] + ([_BYTES] if last.get("use_regex", True) else [])
    return _NAMES.get((tuple(names), bool(model.get("ignore_merges"))))


def _step(step: Mapping[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return _DIGITS
    plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return (step.get("pattern") or {}).get("Regex") if plain else None


def _tokens(content: dict[str, Any], vocabulary: int) -> Pieces:
    """List texts and types of all tokens by number, no scores; numbers without a token are filled."""
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [_UNUSED] * vocabulary
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, _NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    return Pieces(tokens, [], types)
