"""Calibration samples of every kind, and which of their rows count."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_ext.forwards.calls import CalibrationError, Call, read_calls, run_call

CPU = torch.device("cpu")
X, Y = torch.arange(6).view(2, 3), torch.tensor([0, 1])


def only(sample: Any, **options: Any) -> Call:
    (call,) = read_calls([sample], CPU, **options)
    return call


def test_a_tensor_is_one_positional_argument() -> None:
    call = only(X)
    assert len(call.args) == 1
    assert torch.equal(call.args[0], X)
    assert call.kwargs == {}


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: namedtuple("Pair", "x y")(*pair)])
def test_a_sequence_is_positional(kind: Any) -> None:
    call = only(kind((X, Y)))
    assert len(call.args) == 2
    assert torch.equal(call.args[1], Y)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_keywords(kind: Any) -> None:
    call = only(kind(ids=X, use_cache=False))
    assert call.args == ()
    assert torch.equal(call.kwargs["ids"], X)
    assert call.kwargs["use_cache"] is False


def test_first_takes_the_inputs_of_pairs() -> None:
    assert len(only((X, Y), inputs="first").args) == 1
    inner = only(({"ids": X}, Y), inputs="first")
    assert list(inner.kwargs) == ["ids"]
    assert torch.equal(only(X, inputs="first").args[0], X)


def test_a_function_chooses_the_inputs() -> None:
    call = only({"deep": [X, Y]}, inputs=lambda sample: sample["deep"][0])
    assert torch.equal(call.args[0], X)


def test_a_dataloader_of_pairs() -> None:
    pairs = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.zeros(5))
    calls = read_calls(torch.utils.data.DataLoader(pairs, batch_size=2), CPU, inputs="first")
    assert [call.args[0].shape for call in calls] == [(2, 3), (2, 3), (1, 3)]


def tokenize(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) for c in text]}


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenize,
        lambda text: tokenize(text)["input_ids"],
        lambda text: torch.tensor([tokenize(text)["input_ids"]]),
        lambda text: UserDict(tokenize(text)),
    ],
)
def test_texts_are_cut_into_windows_and_the_rest_is_kept(tokenizer: Any) -> None:
    calls = read_calls(["abcdefgh", "xyz"], CPU, tokenizer=tokenizer, seq_len=3)
    texts = ["".join(chr(i) for i in call.args[0][0].tolist()) for call in calls]
    assert texts == ["abc", "def", "gh", "xyz"]
    assert all(call.args[0].dtype == torch.long and call.args[0].dim() == 2 for call in calls)


def test_nested_tensors_are_moved() -> None:
    call = only({"a": [X, (Y, {"b": X})], "c": None}, inputs="all")
    read = read_calls([{"a": [X, (Y, {"b": X})], "c": None}], torch.device("meta"))[0].kwargs
    assert call.kwargs["c"] is None
    assert read["a"][0].is_meta
    assert read["a"][1][0].is_meta
    assert read["a"][1][1]["b"].is_meta


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_an_empty_loader(empty: Any) -> None:
    with pytest.raises(ValueError, match="calib_loader is empty"):
        read_calls(empty, CPU)


def test_texts_without_tokens_are_left_out() -> None:
    """Data sets of lines have many empty ones; a batch of no tokens is an error to most models."""
    calls = read_calls(["", "ab", ""], CPU, tokenizer=tokenize)
    assert [call.args[0].shape for call in calls] == [(1, 2)]
    with pytest.raises(ValueError, match="calib_loader is empty"):
        read_calls(["", ""], CPU, tokenizer=tokenize)


@pytest.mark.parametrize("loader", [X, "text", {"ids": X}, 7, None])
def test_no_loader_at_all(loader: Any) -> None:
    with pytest.raises(TypeError, match="calib_loader is a"):
        read_calls(loader, CPU)


def test_a_sample_of_no_known_kind_is_numbered() -> None:
    with pytest.raises(TypeError, match="sample 1 of calib_loader is a int"):
        read_calls([X, 5], CPU)
    with pytest.raises(TypeError, match=r"sample 0 .* pass tokenizer="):
        read_calls(["text"], CPU)


@pytest.mark.parametrize("inputs", ["second", 0, None])
def test_a_bad_inputs_setting(inputs: Any) -> None:
    with pytest.raises(TypeError, match=f"inputs={inputs!r}"):
        read_calls([X], CPU, inputs=inputs)


def test_the_loaders_own_error_passes() -> None:
    def loader() -> Any:
        yield X
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        read_calls(loader(), CPU)


def test_row_mask_fits_by_shape() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    call = Call(kwargs={"ids": X, "attention_mask": mask})
    expected = mask != 0

    def found(x: Tensor) -> Tensor:
        fitting = call.row_mask(x)
        assert fitting is not None
        return fitting

    assert torch.equal(found(torch.zeros(2, 3, 8)), expected)
    assert torch.equal(found(torch.zeros(6, 8)), expected.flatten())
    # heads or other single dimensions in between leave the rows what they are
    assert torch.equal(found(torch.zeros(2, 1, 3, 8)), expected[:, None])
    assert call.row_mask(torch.zeros(2, 4, 8)) is None
    assert call.row_mask(torch.zeros(2, 8)) is None


def test_each_of_two_masks_serves_its_own_length() -> None:
    long, short = torch.ones(2, 5), torch.ones(2, 3)
    call = Call(kwargs={"attention_mask": long, "decoder_attention_mask": short, "other_mask": torch.ones(2, 4)})
    assert call.row_mask(torch.zeros(2, 5, 1)) is not None
    assert call.row_mask(torch.zeros(2, 3, 1)) is not None
    assert call.row_mask(torch.zeros(2, 4, 1)) is None


def test_rows_that_a_padding_mask_of_torch_marks_do_not_count() -> None:
    padding = torch.tensor([[False, False, True], [False, True, True]])
    call = Call(kwargs={"src_key_padding_mask": padding})
    assert torch.equal(call.row_mask(torch.zeros(2, 3, 8)), ~padding)
    added = torch.zeros(2, 3).masked_fill(padding, float("-inf"))
    assert torch.equal(Call(kwargs={"key_padding_mask": added}).row_mask(torch.zeros(2, 3, 8)), ~padding)
    assert call.row_mask(torch.zeros(3, 2, 8)) is None  # [sequence, batch]
    square = {"src_key_padding_mask": torch.zeros(3, 3, dtype=torch.bool)}
    assert Call(kwargs=square).row_mask(torch.zeros(3, 3, 8)) is None


def test_masks_of_other_kinds_are_no_row_masks() -> None:
    assert Call(kwargs={"attention_mask": torch.zeros(2, 1, 3, 3)}).row_mask(torch.zeros(2, 3, 1)) is None
    assert Call(kwargs={"attention_mask": None}).row_mask(torch.zeros(2, 3, 1)) is None


class Overwrites(nn.Module):
    """Writes its input, and refuses zeros."""

    def forward(self, x: Tensor, again: Tensor) -> Tensor:
        if not x.any():
            raise ArithmeticError("nothing to see")
        y = again.clone()
        x.zero_()
        return y + again  # which is 0 by now if it is the same tensor


def test_a_call_on_copies_leaves_its_arguments() -> None:
    x = torch.ones(2, 3)
    call = Call((x,), {"again": x}, hint="a hint")
    copied = call.on_copies(" and another")
    assert copied.hint == "a hint and another"
    assert call.on_copies().hint == "a hint"
    assert copied.args[0] is copied.kwargs["again"]
    assert torch.equal(run_call(Overwrites(), copied, 0), torch.ones(2, 3))
    assert torch.equal(x, torch.ones(2, 3))


def test_an_error_of_the_model_tells_the_batch_and_what_to_do() -> None:
    call = Call((torch.zeros(2, 3),), {"again": torch.zeros(4)}, hint=" Try another.")
    words = r"rejected calibration batch 7 \(tensor shapes \[\(2, 3\), \(4,\)\]\): ArithmeticError: nothing to see\. Try another\."
    with pytest.raises(CalibrationError, match=words) as caught:
        run_call(Overwrites(), call, 7)
    assert type(caught.value.__cause__) is ArithmeticError
