"""Tokenizers in GGUF metadata: what is written of tokenizer.json, what is left out, and what llama.cpp would join by it."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from counterparts.gguf_tokenizers import save, sentencepiece, texts

from awq_ext.checkpoints.gguf import tokenizers
from awq_ext.checkpoints.gguf.sentencepiece import SPACE, Pieces, Spaces, _ranks, pieces_of, spaces_of

gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer(folder: Path, pattern: str, **model: Any) -> dict[str, Any]:
    """The metadata that is written for a tokenizer of three letters and one pair."""
    from awq_ext.checkpoints.gguf import tokenizers

    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **model},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "added_tokens": [
            {"id": 3, "content": "<|end|>", "special": True},
            {"id": 4, "content": "<x>", "special": False},
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    writer = gguf.GGUFWriter(None, "qwen2")
    tokenizers.describe(folder, writer, {"vocab_size": 6})
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def test_a_byte_level_tokenizer_is_described(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, QWEN)
    assert (found["model"], found["pre"]) == ("gpt2", "qwen2")
    assert found["tokens"] == ["a", "b", "ab", "<|end|>", "<x>", "[PAD5]"]
    assert found["token_type"] == [1, 1, 1, 3, 4, 5]
    assert found["merges"] == ["a b"] and found["eos_token_id"] == 3
    assert tokenizer(tmp_path, QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1), ignore_merges=True)["pre"] == "llama-bpe"


@pytest.mark.parametrize(
    "pattern, model", [(r"\s+", {}), (QWEN, {"byte_fallback": True}), (QWEN, {"ignore_merges": True})]
)
def test_other_tokenizers_are_left_out_with_a_warning(pattern: str, model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="written without a tokenizer"):
        assert tokenizer(tmp_path, pattern, **model)["model"] == "none"


def described(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, "llama")
    tokenizers.describe(folder, writer, config)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def joined(text: str, pieces: Pieces, spaces: Spaces) -> list[int]:
    """What llama.cpp does: the pair whose token has the highest score, the leftmost of them, until there is none; then bytes."""
    numbers = {piece: number for number, piece in enumerate(pieces.texts)}
    parts = list((SPACE if spaces.prefix else "") + text.replace(" ", SPACE))
    while True:
        pairs = [(-pieces.scores[numbers[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in numbers]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytes_ = {part: [numbers[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts if part not in numbers}
    return [number for part in parts for number in bytes_.get(part) or [numbers[part]]]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_scores_join_what_merges_join(kind: str, tmp_path: Path) -> None:
    content = sentencepiece(kind)
    tokenizer = save(tmp_path, content)
    spaces, pieces = spaces_of(content), pieces_of(content, tokenizer.get_vocab_size())
    assert spaces == (kind == "llama", True) and pieces is not None
    plain = [text[:60] for text in texts() if "<" not in text]
    assert len(plain) > 100
    for text in plain:
        assert [1, *joined(text, pieces, spaces)] == tokenizer.encode(text).ids, text
    found = described(tmp_path, {"vocab_size": tokenizer.get_vocab_size() + 2, "eos_token_id": [2, 0]})
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", kind == "llama")
    # bos is what the tokenizer puts first, eos what config.json says
    assert (found["bos_token_id"], found["add_bos_token"], found["eos_token_id"]) == (1, True, 2)
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    special = {"<unk>": 2, "<s>": 3, "<|end|>": 3, "<tag>": 4, "<0x0A>": 6, SPACE: 1}
    assert {text: types[text] for text in special} == special and found["token_type"][-1] == 5


def torn(content: dict[str, Any]) -> None:
    """The merges of one token are apart."""
    merges = content["model"]["merges"]
    merges.append(
        merges.pop(next(i for i, (a, b) in enumerate(merges) if merges[i - 1][0] + merges[i - 1][1] == a + b))
    )


def lacking(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def without_a_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0x0b>"] = content["model"]["vocab"].pop("<0x0B>")


def twice(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["id"] = len(content["model"]["vocab"]) + 2


def zero(content: dict[str, Any]) -> None:
    content["added_tokens"][-1]["content"] = "a\0"


OTHERS = {
    "merges of a token apart": torn,
    "a merge that is missing": lacking,
    "no token for a byte": without_a_byte,
    "two tokens of one text": twice,
    "a zero in a token": zero,
    "another normalizer": lambda content: content.update(normalizer={"type": "NFKC"}),
    "split at spaces": lambda content: content.update(
        normalizer=None, pre_tokenizer={"type": "Split", "pattern": {"String": " "}}
    ),
    "more tokens than rows": lambda content: content["added_tokens"][-1].update(id=5000),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_what_llama_cpp_would_join_otherwise_is_left_out(what: str, tmp_path: Path) -> None:
    content = sentencepiece("llama")
    size = len(content["model"]["vocab"]) + 4
    OTHERS[what](content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="written without a tokenizer"):
        assert described(tmp_path, {"vocab_size": size})["model"] == "none"


def test_runs_that_merges_cut_otherwise_are_left_out() -> None:
    """Of five spaces merges make 2 + 3, scores 4 + 1: two and two come late among the merges, but four as a token early."""
    pairs = ((1, 1), (1, 3), (2, 1), (2, 2), (3, 1))
    assert _ranks([(SPACE * a, SPACE * b) for a, b in pairs]) is None


NEARLY = {
    "begins with a space": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "split": False},
    },
    "spaces beside <tag>": {"rstrip": True},
    "<tag> within a word": {"normalized": True},
}


@pytest.mark.parametrize("what", list(NEARLY))
def test_where_tokens_differ_is_said(what: str, tmp_path: Path) -> None:
    content = sentencepiece("llama")
    change = NEARLY[what]
    (content if "normalizer" in change else content["added_tokens"][-1]).update(change)
    tokenizer = save(tmp_path, content)
    with pytest.warns(UserWarning, match=f"the same but for .*{what}"):
        assert described(tmp_path, {"vocab_size": tokenizer.get_vocab_size()})["model"] == "llama"


def test_a_tokenizer_that_is_the_same_is_written_without_a_word(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, sentencepiece("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert described(tmp_path, {"vocab_size": tokenizer.get_vocab_size()})["model"] == "llama"
