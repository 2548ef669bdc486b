"""The demo's sentences: each says what made-up figures say, whichever way these turn out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from demo.made_up import compared, layer

from awq_ext.demo import words
from awq_ext.demo.theory import Example, Rounded


def row(rtn: list[float], awq: list[float], scale: list[float], activations: list[float] | None = None) -> Example:
    x = torch.tensor(activations or [20.0, 0.5])
    made = [Rounded(torch.tensor(errors), torch.tensor(errors) * x) for errors in (rtn, awq)]
    return Example(torch.tensor([0.2, 1.2]), x, torch.tensor(scale), *made, bits=3)


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        (
            [0.20, 1.20],
            "of 0.20 where activations are 20 costs 4.00, an error of 1.20 where they are 0.5 costs 0.60. The smaller",
        ),
        ([0.50, 0.10], "costs 10.00, an error of 0.10 where they are 0.5 costs 0.05. The first error hurts more"),
        (
            [0.01, 1.20],
            "costs 0.20, an error of 1.20 where they are 0.5 costs 0.60. The first error does not hurt more",
        ),
    ],
)
def test_which_hurts(errors: list[float], says: str) -> None:
    assert says in words.which_hurts(row(errors, errors, [2.0, 0.5]))


@pytest.mark.parametrize(
    ("awq", "scale", "says"),
    [
        ([0.05, 1.30], [2.0, 0.5], "goes from 0.200 to 0.050. All channels together cost 1.65 instead of 4.60"),
        ([0.21, 1.30], [2.0, 0.5], "does not pay here: all channels together cost 4.85, with RTN 4.60"),
        ([0.20, 1.20], [1.0, 1.0], "finds no scale that costs less"),
    ],
)
def test_what_scaling_does(awq: list[float], scale: list[float], says: str) -> None:
    said = words.what_scaling_does(row([0.20, 1.20], awq, scale))
    assert says in said
    assert ("multiplied by 2.0" in said) == (scale[0] == 2)


RTN = [0.20, 0.22, 0.24, 0.26]


@pytest.mark.parametrize(
    ("awq", "says"),
    [
        ([0.10, 0.11, 0.12, 0.13], "AWQ removes 50%, "),
        ([0.30, 0.33, 0.36, 0.39], "AWQ removes none and adds 50%, "),
        ([0.18, 0.24, 0.22, 0.28], "AWQ removes nothing that so little text can show, "),
    ],
)
def test_verdict(awq: list[float], says: str) -> None:
    found = compared(RTN, awq, [0.05, 0.055, 0.06, 0.065])
    for bits in (4, 3):
        said = f"at {bits} bits {says}AWQ+GPTQ removes 75%"
        assert words.verdict(found, [bits]) == f"Of RTN's divergence, at the same size: {said}."


def test_verdict_of_one_window_or_of_no_divergence() -> None:
    assert words.verdict(compared([0.2], [0.1], [0.1]), [4]).count("nothing that so little text can show") == 2
    said = words.verdict(compared([0.0, 0.0], [0.1, 0.2], [0.1, 0.1]))
    assert said == "Of RTN's divergence, at the same size: at 4 bits there is none; at 3 bits there is none."


@pytest.mark.parametrize(
    ("decode", "prefill", "says"),
    [
        (30, 500, "int4 takes 26% of the memory of bf16, decode is 3.3 times as fast, prefill is 2.0 times as fast."),
        (30, 1020, "bf16, decode is 3.3 times as fast, prefill takes about as long."),
        (30, 980, "bf16, decode is 3.3 times as fast, prefill takes about as long."),
        (
            30,
            1500,
            "decode is 3.3 times as fast. int4 is slower than bf16 here for 512 rows (1.5 times as long): awq-ext bench",
        ),
        (
            200,
            1500,
            "bf16. int4 is slower than bf16 here for 1 row (2.0 times as long) and for 512 rows (1.5 times as long):",
        ),
    ],
)
def test_layer_words(decode: float, prefill: float, says: str) -> None:
    assert says in words.layer_words(layer(decode=(100, decode), prefill=(1000, prefill)))


def test_layer_words_take_the_bytes_from_the_layer() -> None:
    made = layer(decode=(1, 1), prefill=(1, 1))
    assert "takes 50% of the memory" in words.layer_words(replace(made, int4_bytes=made.float_bytes // 2))
