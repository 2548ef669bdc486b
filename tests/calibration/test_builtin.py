"""The built-in calibration texts: what is in them, and quantizing on their name."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
from readers import VOCABULARY, Reader

import awq_ext
from awq_ext import AwqConfig
from awq_ext.calibration.builtin import NO_TOKENIZER, builtin_text

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
    for name in ("generated_tokens", "random_tokens"):
        assert (named.awq_report.config[name], given.awq_report.config[name]) == (0, None)
    for key, value in named.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])


def test_what_settings_say_of_generated_text_counts() -> None:
    model = awq_ext.quantize(Reader(), "builtin", tokenizer=tokenizer, random_tokens=0.5, **FAST)
    assert model.awq_report.config["random_tokens"] == 0.5
    assert "windows of random tokens" in model.awq_report.notes[0]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r'calib_loader="builtin" is a text: pass tokenizer='):
        awq_ext.quantize(Reader(), "builtin", **FAST)
    with pytest.raises(TypeError, match=r'calib_loader is a str.*or "builtin"'):
        awq_ext.quantize(Reader(), "wikitext", tokenizer=tokenizer, **FAST)


MIXED = {**FAST, "builtin_text": True}


def windows_of_mix() -> list[torch.Tensor]:
    ids = torch.tensor(tokenizer(builtin_text())["input_ids"])
    return list(ids[: len(ids) // 64 * 64].view(-1, 1, 64))


@pytest.mark.parametrize("by_name", [False, True])
def test_beside_other_text_it_is_more_of_it(by_name: bool) -> None:
    given = [torch.arange(64).view(1, 64) % VOCABULARY, torch.zeros(2, 64, dtype=torch.int64)]
    both = [*given, *windows_of_mix()]
    if by_name:
        given, both = ([{"input_ids": one} for one in part] for part in (given, both))
    mixed = awq_ext.quantize(Reader(), given, tokenizer=tokenizer, **MIXED)
    whole = awq_ext.quantize(Reader(), both, **FAST)
    for key, value in mixed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])
    count = len(windows_of_mix())
    assert mixed.awq_report.notes == [f"calibrated on 2 batches, and on {count} windows of the built-in texts"]


def test_without_a_tokenizer_or_beside_other_inputs_it_is_left_out_and_said() -> None:
    ids = [torch.arange(64).view(1, 64) % VOCABULARY]
    plain = awq_ext.quantize(Reader(), ids, **FAST)
    with pytest.warns(UserWarning, match="pass tokenizer=, or builtin_text=False") as seen:
        alone = awq_ext.quantize(Reader(), ids, **MIXED)
    assert [str(one.message) for one in seen].count(NO_TOKENIZER) == 1
    for key, value in alone.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    assert alone.awq_report.warnings == [NO_TOKENIZER] and alone.awq_report.config == plain.awq_report.config
    with pytest.warns(UserWarning, match=r"^fast: calibrated without the texts"):
        awq_ext.compare(Reader(), ids, {"ids": ids}, ["rtn", "fast"], speed_seconds=0, **FAST | {"method": "awq"})

    linear = torch.nn.Sequential(torch.nn.Linear(32, 16))
    floats = awq_ext.quantize(linear, [torch.randn(8, 32)], tokenizer=tokenizer, **MIXED)
    said = "the built-in texts took no part in the calibration: "
    assert floats.awq_report.notes == [said + "the calibration batches are not token ids alone"]


def test_what_the_model_writes_gives_way_to_it() -> None:
    for name in ("generated", "random"):
        share, tokens = f"{name}_share", f"{name}_tokens"
        assert getattr(AwqConfig(method="gptq"), share) == 0.25
        assert getattr(AwqConfig(method="gptq", builtin_text=True), share) == 0
        assert getattr(AwqConfig(method="gptq", builtin_text=True, **{tokens: 0.5}), share) == 0.5


def test_the_plan_counts_it() -> None:
    ids, settings = torch.arange(64).view(1, 64) % VOCABULARY, {"group_size": 16, "seq_len": 64}
    alone = awq_ext.plan(Reader(), ids, tokenizer=tokenizer, **settings)
    mixed = awq_ext.plan(Reader(), ids, tokenizer=tokenizer, builtin_text=True, **settings)
    many = awq_ext.plan(Reader(), ids, tokenizer=tokenizer, batches=1 + len(windows_of_mix()), **settings)
    assert alone.planned_memory_bytes < mixed.planned_memory_bytes == many.planned_memory_bytes
