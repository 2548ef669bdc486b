"""Random tokens beside the calibration text: which ids are drawn, which stay, and what they are good for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext.calibration.extra_batches import random_calls
from awq_ext.forwards.calls import CalibrationError, Call

VOCAB, WIDTH = 64, 32
FAST = {"group_size": 16, "fold": "never", "progress": False}


class Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Reader(nn.Module):
    """Token ids in, vectors out, as models of transformers take them; each half of the vocabulary has its half of the width."""

    def __init__(self, forbidden: int = -1, **config: Any) -> None:
        super().__init__()
        self.config = Config(**config)
        self.forbidden = forbidden
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        with torch.no_grad():
            self.tokens.weight[: VOCAB // 2, WIDTH // 2 :] = 0
            self.tokens.weight[VOCAB // 2 :, : WIDTH // 2] = 0
        self.up = nn.Linear(WIDTH, 48, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        if (input_ids == self.forbidden).any():
            raise ValueError(f"no token {self.forbidden} here")
        return self.up(self.tokens(input_ids))


def texts(count: int, most: int = VOCAB // 2) -> list[Call]:
    return [Call(kwargs={"input_ids": torch.randint(0, most, (2, 100))}) for _ in range(count)]


@pytest.mark.parametrize(
    "share, calls, expected", [(0.25, 8, 2), (0.25, 1, 1), (0.1, 32, 3), (1, 5, 5), (2.5, 2, 5), (0, 8, 0)]
)
def test_as_many_as_the_share_says(share: float, calls: int, expected: int) -> None:
    assert len(random_calls(Reader(), texts(calls), share)) == expected


def test_ids_come_from_the_whole_vocabulary_and_are_the_same_each_time() -> None:
    given = texts(8)
    before = [call.kwargs["input_ids"].clone() for call in given]
    drawn, again = (random_calls(Reader(), given, 1) for _ in range(2))
    assert all(torch.equal(call.kwargs["input_ids"], ids) for call, ids in zip(given, before, strict=True))
    ids = torch.cat([call.kwargs["input_ids"].flatten() for call in drawn])
    assert ids.dtype == before[0].dtype
    # 1600 draws miss one of 64 tokens once in 10^9 times
    assert ids.unique().tolist() == list(range(VOCAB))
    assert torch.equal(ids, torch.cat([call.kwargs["input_ids"].flatten() for call in again]))


def test_special_and_masked_ids_stay() -> None:
    config = {
        "vocab_size": 60,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "text": {"image_token_index": 7},
    }
    ids, mask = torch.arange(VOCAB).repeat(2, 4)[:, :200], torch.ones(2, 200, dtype=torch.long)
    mask[1, 150:] = 0
    call = Call(kwargs={"input_ids": ids, "attention_mask": mask})
    (drawn,) = random_calls(Reader(**config), [call], 1)
    new, special = drawn.kwargs["input_ids"], torch.tensor([1, 2, 3, 7])
    assert torch.equal(drawn.kwargs["attention_mask"], mask)
    assert torch.equal(new[1, 150:], ids[1, 150:])
    there = torch.isin(ids, special)
    assert torch.equal(new[there], ids[there])
    free = ~torch.isin(ids, torch.cat([special, torch.arange(60, VOCAB)])) & (mask != 0)  # beyond vocab_size: padding
    assert (new[free] != ids[free]).float().mean() > 0.9
    assert not torch.isin(new[free], special).any()
    assert new[free].max() < 60


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_by_place_and_by_name(dtype: torch.dtype) -> None:
    ids, mask = torch.zeros(1, 50, dtype=dtype), torch.ones(1, 50)
    for call in (Call((ids, mask, ids)), Call((ids,), {"attention_mask": mask, "decoder_input_ids": ids})):
        (drawn,) = random_calls(Reader(), [call], 1)
        values = (
            dict(zip(("input_ids", "attention_mask", "decoder_input_ids"), drawn.args, strict=False)) | drawn.kwargs
        )
        assert torch.equal(values["attention_mask"], mask)
        for name in ("input_ids", "decoder_input_ids"):
            assert values[name].dtype == dtype
            assert values[name].unique().numel() > 20


def test_models_and_calls_without_token_ids_get_none() -> None:
    ids = Call((torch.zeros(1, 5, dtype=torch.long),))
    pixels = Reader()
    pixels.get_input_embeddings = lambda: nn.Conv2d(3, 4, 2)  # type: ignore[method-assign]
    assert random_calls(nn.Linear(3, 3), [ids], 1) == []
    assert random_calls(pixels, [ids], 1) == []
    assert (
        random_calls(Reader(), [Call((torch.zeros(1, 5),)), Call(kwargs={"inputs_embeds": torch.zeros(1, 5, 3)})], 1)
        == []
    )


def test_errors_fall_where_no_calibration_row_leads() -> None:
    """Error feedback moves errors into directions that the calibration text does not show: other text pays for it."""
    torch.manual_seed(0)
    original = Reader()
    calib = [torch.randint(0, VOCAB // 2, (1, 100)) for _ in range(8)]
    other = torch.randint(VOCAB // 2, VOCAB, (1, 200))
    expected = original(other)
    errors = {}
    for share in (0, 0.25):
        model = Reader()
        model.load_state_dict(original.state_dict())
        report = awq_ext.quantize(
            model, calib, method="gptq", random_tokens=share, objective="layer", **FAST
        ).awq_report
        assert report["up"].tokens == 800 * (1 + share)
        assert report.notes == (["calibrated on 8 batches, and on 2 windows of random tokens"] if share else [])
        errors[share] = float((model(other) - expected).detach().square().sum())
    assert errors[0.25] < 0.9 * errors[0]


@pytest.mark.parametrize(
    "options, tokens",
    [
        ({"method": "rtn"}, 40),
        ({"method": "awq"}, 40),
        ({"method": "awq", "random_tokens": 0.5}, 60),
        ({"method": "awq+gptq"}, 50),
        ({"method": "gptq", "random_tokens": 0}, 40),
        ({"method": "awq", "per_layer": {"up": {"method": "gptq"}}}, 50),
    ],
)
def test_error_feedback_gets_a_quarter_unless_told(options: dict[str, Any], tokens: int) -> None:
    calib = [torch.zeros(1, 10, dtype=torch.long) for _ in range(4)]
    assert awq_ext.quantize(Reader(), calib, **options, **FAST).awq_report["up"].tokens == tokens


def test_a_rejected_batch_says_that_it_was_drawn() -> None:
    model, calib = Reader(forbidden=VOCAB - 1), [torch.randint(0, 30, (2, 100)) for _ in range(2)]
    weight = model.up.weight
    with pytest.raises(CalibrationError, match=r"no token 63 here.*random_tokens=0 leaves them out"):
        awq_ext.quantize(model, calib, random_tokens=1, **FAST)
    assert model.up.weight is weight
    awq_ext.quantize(model, calib, random_tokens=0, **FAST)


@pytest.mark.parametrize(
    "value, error", [(-0.1, ValueError), (float("inf"), ValueError), (True, TypeError), ("a", TypeError)]
)
def test_a_bad_share_is_an_error(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="random_tokens"):
        awq_ext.AwqConfig(random_tokens=value)
