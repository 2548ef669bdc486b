"""Batches of token ids that are shortened to a number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readers import VOCABULARY, Reader
from torch import nn

import awq_ext
from awq_ext.calibration.builtin import builtin_text
from awq_ext.calibration.windows import SHORTEST, at_most, count_tokens, ids_of
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


def test_windows_of_very_different_length_leave_no_text_out() -> None:
    """Short windows cannot be cut, so a long one is cut more: it is not left out for them."""
    short = at_most([*(call(1, SHORTEST) for _ in range(10)), call(1, 100_000)], 8192)
    assert [ids_of(one).shape[1] for one in short] == [SHORTEST] * 10 + [8192 - 10 * SHORTEST]


@pytest.mark.parametrize("tokens", [1, 127, 1000, 2999, 6000])
def test_the_limit_holds_for_padded_windows_of_any_length(tokens: int) -> None:
    def padded(length: int) -> Call:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[:, 0] = 0
        return call(2, length, attention_mask=mask)

    short = at_most([*map(padded, (9, 2000, 30, 900, 10)), call(3, 500)], tokens)
    assert 0 < count_tokens(short) <= tokens or sum(len(ids_of(one)) for one in short) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_padding_does_not_count(dtype: torch.dtype) -> None:
    mask = torch.zeros(64, 512, dtype=dtype)
    mask[:, :10] = 1
    batch = call(64, 512, attention_mask=mask)
    assert at_most([batch], 640)[0] is batch
    assert count_tokens([batch]) == 640
    assert count_tokens(at_most([batch], 320)) == 320


def test_what_is_left_holds_no_memory_of_the_whole() -> None:
    whole = call(64, 512)
    for one in at_most([whole, whole], 16_000):
        assert ids_of(one).untyped_storage().nbytes() == ids_of(one).nbytes


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
    # 8 x 260: the windows of the texts, cut to 128, leave a little more than half
    assert report.calibration_tokens == 2080
    assert report.builtin_tokens == 15 * SHORTEST
    assert report.notes[0] == (
        "calibrated on 2,080 of the 8,000 tokens given, and on 1,920 of the built-in texts "
        "(max_calib_tokens=4000, where 0 is no limit)"
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


class Wide(nn.Module):
    """Ids in, rows of 600 channels in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 600)
        self.layer = nn.Linear(600, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(ids))


def test_a_limit_below_a_token_for_each_channel_is_noted_with_error_feedback() -> None:
    given, settings = [torch.randint(VOCABULARY, (1, 500)) for _ in range(4)], {"group_size": 32, "progress": False}
    more = {"random_tokens": 0, "generated_tokens": 0, "objective": "layer"}
    few = "512 tokens are few for error feedback on Linears of 600 input channels: max_calib_tokens=1200 takes two for each"
    for method, most, noted in (("gptq", 512, True), ("awq", 512, False), ("gptq", 640, False)):
        report = awq_ext.quantize(Wide(), given, method=method, max_calib_tokens=most, **settings, **more).awq_report
        assert (few in report.notes) == noted


def test_an_effort_beside_plain_rounding_is_noted() -> None:
    given, settings = (
        [torch.randint(VOCABULARY, (1, 500))],
        {"group_size": 32, "tokenizer": tokenizer, "progress": False},
    )
    for effort, method, noted in (
        ("best", "rtn", True),
        ("fast", "rtn", True),
        (None, "rtn", False),
        ("fast", "awq", False),
    ):
        chosen = {"method": method} | ({"effort": effort} if effort else {})
        notes = awq_ext.quantize(Wide(), given, **settings, **chosen).awq_report.notes
        assert any("an effort changes nothing" in one for one in notes) == noted


def test_the_smallest_limit_is_one_too() -> None:
    """Half of it is no token at all, and 0 would be no limit."""
    settings = {"group_size": 16, "seq_len": 256, "builtin_text": True, "progress": False, "method": "gptq"}
    given = [torch.randint(VOCABULARY, (1, 500)) for _ in range(4)]
    report = awq_ext.quantize(Reader(), given, tokenizer=tokenizer, max_calib_tokens=1, **settings).awq_report
    assert (report.calibration_tokens, report.builtin_tokens) == (SHORTEST, SHORTEST)
    assert report.few_tokens.startswith("256 calibration tokens")


def test_notes_count_without_padding_as_the_report_does() -> None:
    mask = torch.ones(8, 200, dtype=torch.int64)
    mask[:, :100] = 0
    batch = {"input_ids": torch.randint(VOCABULARY, (8, 200)), "attention_mask": mask}
    report = awq_ext.quantize(Masked(), [batch], group_size=16, max_calib_tokens=450, progress=False).awq_report
    assert report.calibration_tokens == 400
    assert report.notes[0] == "calibrated on 400 of the 800 tokens given (max_calib_tokens=450, where 0 is no limit)"


class Masked(Reader):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return super().forward(input_ids)


class Whole(Reader):
    """Reads windows of one length alone."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return super().forward(input_ids.view(-1, 512))


def test_a_model_that_rejects_shortened_windows_says_what_shortened_them() -> None:
    given = [torch.randint(VOCABULARY, (1, 512)) for _ in range(2)]
    with pytest.raises(awq_ext.CalibrationError, match="max_calib_tokens has shortened it"):
        awq_ext.quantize(Whole(), given, group_size=16, max_calib_tokens=600, progress=False)
    awq_ext.quantize(Whole(), given, group_size=16, max_calib_tokens=1024, progress=False)
    with pytest.raises(awq_ext.CalibrationError, match="builtin_text=False leaves them out"):
        awq_ext.quantize(Whole(), given, group_size=16, builtin_text=True, tokenizer=tokenizer, progress=False)


def test_the_plan_counts_no_more_batches_than_the_limit_allows() -> None:
    ids = torch.randint(VOCABULARY, (1, 512))
    plans = [awq_ext.plan(Reader(), ids, batches=n, group_size=16, max_calib_tokens=2048) for n in (3, 4, 40)]
    assert plans[0].planned_memory_bytes < plans[1].planned_memory_bytes == plans[2].planned_memory_bytes
