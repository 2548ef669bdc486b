"""Batches of token ids that are shortened to a number of tokens."""

from __future__ import annotations

import pytest
import torch
from readers import VOCABULARY, Reader

import awq_ext
from awq_ext.calibration.builtin import builtin_text
from awq_ext.calibration.windows import SHORTEST, at_most, ids_of
from awq_ext.forwards.calls import Call


def call(rows: int, length: int, start: int = 0, **masks: torch.Tensor) -> Call:
    ids = start + torch.arange(rows * length).view(rows, length)
    return Call(kwargs={"input_ids": ids, **masks}) if masks else Call(args=(ids,))


def count(calls: list[Call]) -> int:
    return sum(ids_of(one).numel() for one in calls)


def test_every_window_keeps_the_same_share_of_its_beginning() -> None:
    mask = torch.ones(2, 400, dtype=torch.int64)
    calls = [call(1, 600), call(2, 400, 1000, attention_mask=mask)]
    short = at_most(calls, 700)
    assert [ids_of(one).shape for one in short] == [(1, 300), (2, 200)]
    for one, whole in zip(short, calls, strict=True):
        assert torch.equal(ids_of(one), ids_of(whole)[:, : ids_of(one).shape[1]])
    assert short[1].kwargs["attention_mask"].shape == (2, 200)


def test_no_limit_and_one_that_is_not_reached_change_nothing() -> None:
    calls = [call(1, 600), call(2, 400)]
    for most in (0, 1400, 5000):
        assert all(one is other for one, other in zip(at_most(calls, most), calls, strict=True))


def test_windows_are_not_cut_below_the_shortest_but_left_out_evenly() -> None:
    calls = [call(1, 512, 1000 * i) for i in range(40)]
    short = at_most(calls, 10 * SHORTEST)
    assert [ids_of(one)[0, 0].item() for one in short] == [4000 * i for i in range(10)]
    assert {ids_of(one).shape for one in short} == {(1, SHORTEST)}


def test_rows_of_one_large_batch_are_left_out_too_and_one_stays() -> None:
    (short,) = at_most([call(64, SHORTEST)], 16 * SHORTEST)
    assert ids_of(short)[:, 0].tolist() == [4 * SHORTEST * i for i in range(16)]
    (least,) = at_most([call(3, 10)], 1)
    assert ids_of(least).shape == (1, 10)


def test_padded_windows_are_left_out_whole() -> None:
    """A window padded at its beginning would lose what counts."""
    mask = torch.ones(4, 400, dtype=torch.int64)
    mask[1, :300] = 0
    (short,) = at_most([call(4, 400, attention_mask=mask)], 800)
    assert ids_of(short)[:, 0].tolist() == [0, 800]
    assert torch.equal(short.kwargs["attention_mask"], mask[[0, 2]])


@pytest.mark.parametrize(
    "other",
    [
        Call(args=(torch.randn(2, 400),)),
        call(2, 400, position_ids=torch.arange(800).view(2, 400)),
        call(2, 400, attention_mask=torch.ones(2, 1, 400, 400)),
    ],
    ids=["values", "more than ids", "mask of another shape"],
)
def test_what_is_not_ids_alone_is_not_limited(other: Call) -> None:
    assert at_most([call(1, 600), other], 100)[1] is other


def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def test_quantize_shares_the_limit_with_the_built_in_texts_and_says_so() -> None:
    given = [torch.randint(VOCABULARY, (1, 1000), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    settings = {"group_size": 16, "seq_len": 256, "builtin_text": True, "progress": False}
    model = awq_ext.quantize(Reader(), given, tokenizer=tokenizer, max_calib_tokens=4000, **settings)
    report = model.awq_report
    assert (
        report.calibration_tokens == 2080
    )  # 8 x 260: the windows of the texts, cut to 128, are too many by less than one
    assert report.builtin_tokens == 15 * SHORTEST
    assert report.notes[0] == (
        "calibrated on 2,080 of the 8,000 tokens given, and on 1,920 of the built-in texts: max_calib_tokens=4000; 0 is no limit"
    )

    length = len(tokenizer(builtin_text())["input_ids"]) // 256 * 256
    texts = torch.tensor(tokenizer(builtin_text())["input_ids"][:length]).view(-1, 256)[:, :SHORTEST]
    spaced = [texts[None, i * len(texts) // 15] for i in range(15)]
    same = awq_ext.quantize(Reader(), [one[:, :260] for one in given] + spaced, group_size=16, progress=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[key])


def test_little_given_leaves_more_to_the_built_in_texts() -> None:
    settings = {"group_size": 16, "seq_len": 256, "builtin_text": True, "progress": False}
    given = [torch.randint(VOCABULARY, (1, 500))]
    model = awq_ext.quantize(Reader(), given, tokenizer=tokenizer, max_calib_tokens=8000, **settings)
    assert model.awq_report.calibration_tokens == 500
    assert 7000 < model.awq_report.builtin_tokens <= 7500
