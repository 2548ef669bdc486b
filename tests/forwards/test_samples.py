"""Calibration samples as people have them: what tokenizers, data sets and chats give."""

from __future__ import annotations

import logging
import warnings
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import hf_directory
import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext.forwards.calls import Call, read_calls

CPU = torch.device("cpu")
ROWS = [[5, 6, 7, 8], [9, 10, 11, 12]]
ONES = [1, 1, 1, 0]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


class Reader(nn.Module):
    """A language model's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 8), nn.Linear(8, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        assert labels is None
        return self.head(self.embed(input_ids))


class Wide(Reader):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Tensor:
        return super().forward(input_ids, attention_mask, labels)


class Shifting(Reader):
    """An encoder-decoder, which makes the decoder's input of labels."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Any = None, labels: Any = None) -> Tensor:
        return super().forward(input_ids)


class Tokenizer:
    """One token a letter, a special one before each text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"{one['role'][0]}{one['content']}" for one in messages)


def read(samples: Any, model: nn.Module | None = None, **options: Any) -> list[Call]:
    return read_calls(samples, CPU, model=model or Reader(), **options)


def ids(call: Call) -> list[list[int]]:
    return (call.args[0] if call.args else call.kwargs["input_ids"]).tolist()


@pytest.mark.parametrize(
    "samples",
    [
        ROWS,
        [torch.tensor(row) for row in ROWS],
        [torch.tensor([row]) for row in ROWS],
        [{"input_ids": row} for row in ROWS],
        [{"input_ids": [row]} for row in ROWS],
        [UserDict({"input_ids": row, "attention_mask": ONES}) for row in ROWS],  # what a BatchEncoding is
        [{"input_ids": torch.tensor(row), "attention_mask": torch.tensor(ONES)} for row in ROWS],
        {"input_ids": ROWS, "attention_mask": [ONES, ONES]},  # columns, as a tokenizer gives for two texts
        {"input_ids": torch.tensor(ROWS)},
        ({"input_ids": row} for row in ROWS),
    ],
)
def test_rows_of_tokens_get_a_batch_dimension(samples: Any) -> None:
    calls = read(samples)
    assert [ids(call) for call in calls] == [[row] for row in ROWS]
    for call in calls:
        mask = call.kwargs.get("attention_mask")
        assert mask is None or mask.tolist() == [ONES]
        assert call.tokens == (4 if mask is None else 3)


def test_batches_of_lists() -> None:
    assert ids(read([ROWS])[0]) == ROWS
    assert ids(read([{"input_ids": ROWS}])[0]) == ROWS
    ragged = [[1, 2, 3], [4, 5]]
    assert [ids(call) for call in read([ragged])] == [[row] for row in ragged]
    calls = read([{"input_ids": ragged, "attention_mask": [[1, 1, 0], [1, 1]]}])
    assert [ids(call) for call in calls] == [[row] for row in ragged]
    assert [call.kwargs["attention_mask"].tolist() for call in calls] == [[[1, 1, 0]], [[1, 1]]]


def test_one_dimension_stays_where_no_token_ids_are_read() -> None:
    (call,) = read_calls([torch.arange(4)], CPU, model=nn.Linear(4, 4))
    assert call.args[0].shape == (4,)
    (call,) = read_calls([{"x": [1, 2]}], CPU)
    assert call.kwargs == {"x": [1, 2]}


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (CHAT, "uhiaho"),
        ({"messages": CHAT}, "uhiaho"),
        ({"conversations": SHARED}, "sbeuhiaho"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "uhiaho"),
        ("abc", "\1abc"),
        ({"text": "abc", "label": 3}, "\1abc"),
        ({"prompt": "ab", "completion": "c"}, "\1abc"),
    ],
)
def test_texts_and_chats(sample: Any, text: str) -> None:
    """The template has put the special tokens there; the tokenizer does for other texts."""
    assert ids(read([sample], tokenizer=Tokenizer())[0]) == [[ord(letter) for letter in text]]
    with pytest.raises(TypeError, match="pass tokenizer="):
        read([sample])


def test_a_column_of_a_data_set() -> None:
    class Column:  # of the package datasets: no list, but iterable
        def __iter__(self) -> Iterator[str]:
            return iter(["ab", "cd"])

    assert len(read(Column(), tokenizer=Tokenizer())) == 2
    assert len(read({"text": ["ab", "cd"], "id": [1, 2]}, tokenizer=Tokenizer())) == 2


@pytest.mark.parametrize("model", [Reader(), Wide()])
def test_what_the_forward_does_not_take_is_left_out_and_told_once(model: nn.Module) -> None:
    samples = [{"input_ids": row, "labels": row, "question": "what?", "attention_mask": ONES} for row in ROWS]
    with pytest.warns(UserWarning, match=r"left out .*: labels, question$") as told:
        calls = read(samples, model)
    assert len(told) == 1
    assert all(call.kwargs.keys() == {"input_ids", "attention_mask"} for call in calls)


def test_labels_that_make_an_input_stay() -> None:
    (call,) = read([{"input_ids": ROWS[0], "labels": ROWS[1]}], Shifting())
    assert call.kwargs["labels"].tolist() == [ROWS[1]]


@pytest.mark.parametrize("model", [Reader(), Wide()])
def test_a_row_of_unknown_names_says_how_to_go_on(model: nn.Module) -> None:
    with pytest.raises(
        TypeError, match=r"sample 0 of calib_loader has question, id: .*inputs=lambda row: row\['question'\]"
    ):
        read([{"question": "what?", "id": 3}], model, tokenizer=Tokenizer())


def test_a_data_set_of_several_parts_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is a dict: .*choose one, such as data\['train'\]"):
        read({"train": [{"text": "ab"}], "test": []}, tokenizer=Tokenizer())


def test_few_tokens_are_a_warning_that_names_how_many() -> None:
    def quantized(count: int, **settings: Any) -> list[str]:
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            batches = [torch.randint(0, 300, (4, 250)) for _ in range(count)]
            awq_ext.quantize(Reader(), batches, blocks=[], n_grid=2, progress=False, **settings)
        return [str(one.message) for one in told if "tokens" in str(one.message)]

    (text,) = quantized(1)
    assert text.startswith("1,000 calibration tokens are few: from about 4,000 on")
    assert quantized(4) == quantized(1, method="rtn") == []


def test_tokens_are_those_of_the_decoder_where_only_that_reads_any() -> None:
    ids, sound = torch.randint(0, 300, (2, 7)), torch.randn(2, 8, 40)
    spoken = {"input_features": sound, "decoder_input_ids": ids}
    mask = torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])
    assert Call((), spoken).tokens == Call((sound,), {"decoder_input_ids": ids}).tokens == 14
    assert Call((), {**spoken, "decoder_attention_mask": mask}).tokens == 11
    assert Call((), {"input_ids": ids[:, :3], "decoder_input_ids": ids}).tokens == Call((ids[:, :3],)).tokens == 6
    assert Call((sound,)).tokens == 0


def test_the_same_tokens_make_the_same_model() -> None:
    def layer(samples: Any) -> Tensor:
        torch.manual_seed(0)
        return awq_ext.quantize(Reader(), samples, blocks=[], n_grid=4, progress=False).head.weight

    rows = torch.randint(0, 300, (6, 32))
    expected = layer([row[None] for row in rows])
    assert torch.equal(layer(rows.tolist()), expected)
    assert torch.equal(layer([{"input_ids": row} for row in rows.tolist()]), expected)
    assert torch.equal(layer({"input_ids": rows.tolist()}), expected)


def test_tokenizers_of_transformers_do_not_warn_of_long_texts() -> None:
    """Texts are cut into windows: that they are longer than the model takes at once is no problem."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(handler)
    try:
        for call in (lambda one: read(["x" * 50], tokenizer=one), lambda one: one("x" * 50)):
            tokenizer = hf_directory.tokenizer()
            tokenizer.model_max_length = 8
            call(tokenizer)
            told.append("next")
    finally:
        logger.removeHandler(handler)
    assert told[0] == "next" and "longer than the specified maximum" in told[1], told
