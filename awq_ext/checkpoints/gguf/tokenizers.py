"""Describe a tokenizer.json in GGUF metadata, where llama.cpp has the same one: byte-level BPE with a known pattern."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...reporting.warn import warn
from ..shards import read_json
from .architecture import gguf

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# the pattern that cuts text into words -> llama.cpp's name for it, and whether it looks whole words up before it merges
_PATTERNS = {
    rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}": ("qwen2", False),
    rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def describe(folder: Path, writer: Any, config: Mapping[str, Any]) -> None:
    """Add the tokenizer of ``folder``; "none", with a warning where there is one that llama.cpp has not, or not by this name."""
    path, vocabulary = folder / "tokenizer.json", config["vocab_size"]
    content = read_json(path) if path.exists() else {}
    words = _words(content)
    if words is None:
        if content:
            warn(
                f"{path} is no byte-level BPE with a pattern known here: the GGUF file is written without a tokenizer; "
                "llama.cpp's own converter writes one (convert_hf_to_gguf.py --vocab-only)"
            )
        writer.add_tokenizer_model("none")
        return
    tokens, types = _tokens(content, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf().SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def _words(content: dict[str, Any]) -> str | None:
    """Find llama.cpp's name for how text is cut before it is merged; None for what it may not do the same."""
    model, cut = content.get("model") or {}, content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    steps = cut.get("pretokenizers") if cut.get("type") == "Sequence" else [cut]
    kinds = [step.get("type") for step in steps or []]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return None if model.get("ignore_merges") else "gpt-2"
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True) or steps[1].get("add_prefix_space"):
        return None
    name, whole = _PATTERNS.get((steps[0].get("pattern") or {}).get("Regex"), (None, False))
    return name if bool(model.get("ignore_merges")) == whole else None


def _tokens(content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """List texts and types of all tokens by number; numbers without a token are filled."""
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [_UNUSED] * vocabulary
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, _NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    return tokens, types
