"""The built-in calibration texts: what is in them, and quantizing on their name."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
from readers import VOCABULARY, Reader

import awq_ext
from awq_ext.calibration.builtin import builtin_text

FAST = {"method": "awq", "group_size": 16, "progress": False, "seq_len": 64}


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def test_the_mix() -> None:
    """Many scripts and kinds of text, in a size that adds little to the package, and clean to read."""
    text = builtin_text()
    assert 20_000 < len(text.encode()) < 40_000
    names = {unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha()}
    assert names >= {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARABIC", "DEVANAGARI"}
    for part in ("def ", "#include", "SELECT", "tool_call>", "<html", "möchte"):
        assert part in text, part
    assert unicodedata.normalize("NFC", text) == text
    assert "\r" not in text
    assert "\ufffd" not in text


def test_quantize_by_its_name_is_quantize_on_the_text() -> None:
    named = awq_ext.quantize(Reader(), "builtin", tokenizer=tokenizer, **FAST)
    given = awq_ext.quantize(Reader(), [builtin_text()], tokenizer=tokenizer, **FAST)
    assert named.awq_report.config["generated_tokens"] == 1.0
    assert given.awq_report.config["generated_tokens"] is None
    # this model cannot write, so both saw the same
    for key, value in named.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])


def test_what_settings_say_of_generated_text_counts() -> None:
    model = awq_ext.quantize(Reader(), "builtin", tokenizer=tokenizer, generated_tokens=0, **FAST)
    assert model.awq_report.config["generated_tokens"] == 0


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r'calib_loader="builtin" is a text: pass tokenizer='):
        awq_ext.quantize(Reader(), "builtin", **FAST)
    with pytest.raises(TypeError, match=r'calib_loader is a str.*or "builtin"'):
        awq_ext.quantize(Reader(), "wikitext", tokenizer=tokenizer, **FAST)
