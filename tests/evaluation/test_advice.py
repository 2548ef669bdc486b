"""The words on where int4 is slower than float: by made-up figures, in both directions."""

from __future__ import annotations

import pytest

from awq_ext.evaluation.advice import Timing, advice, one_sentence


def timing(rows: int, linear: float, int4: float, int8: float = 1.0, shape: tuple[int, int] = (4096, 4096)) -> Timing:
    return Timing(*shape, rows, linear, int4, int8)


def test_nothing_is_said_where_int4_is_slower_nowhere() -> None:
    assert advice([timing(1, 10, 1), timing(512, 10, 10.4)]) == []  # 4 % are no difference
    assert advice([]) == []


def test_slower_with_many_rows() -> None:
    words = advice([timing(1, 10, 1), timing(128, 40, 30, 15), timing(512, 100, 150, 50)])
    assert words == [
        "int4 is slower than the float Linear here: 4096 x 4096 with 512 rows (1.5 times as long).",
        'awq_ext.set_compute_dtype(model, "int8") makes it 2.0 times as fast as float there, or more. '
        "It rounds activations to eight bits: check the result with awq-ext eval.",
        "Keep the float model for work that is mostly prefill (long prompts, batches, encoders), and int4 for generating.",
    ]


def test_parts_of_a_long_input_help_only_where_they_take_less_time_for_each_row() -> None:
    """Float: 100 / 512 of a unit a row. int4 with 128 rows: 30 / 128 is more, 20 / 128 less."""
    slow = timing(512, 100, 150, 200)
    assert not any("Fewer rows" in line for line in advice([timing(128, 40, 30), slow]))
    (line,) = (line for line in advice([timing(128, 40, 20), slow]) if "Fewer rows" in line)
    assert line == "Fewer rows at once help 4096 x 4096: 128 rows take less time for each row. Split long inputs."


def test_slower_with_few_rows() -> None:
    words = advice([timing(1, 10, 13, 12), timing(8, 40, 20), timing(32, 160, 70), timing(1, 9, 1, 1, (64, 64))])
    assert words[0] == "int4 is slower than the float Linear here: 4096 x 4096 with 1 row (1.3 times as long)."
    assert (
        words[1] == "More rows at once help 4096 x 4096: 8 and 32 rows take less time for each row. Run larger batches."
    )
    assert words[2] == 'compute_dtype="int8" is not faster than float there either.'
    # another shape is faster at one row: neither few nor many rows decide alone
    assert words[3].startswith("Measure your own shapes")
    assert advice([timing(1, 10, 13, 12), timing(8, 40, 20)])[-1] == (
        "Keep the float model for generating one token at a time, and int4 for prompts and batches."
    )


def test_slower_everywhere() -> None:
    words = advice([timing(rows, 1, rows, rows / 2) for rows in (2, 3, 4, 5)])
    assert words[0] == (
        "int4 is slower than the float Linear here: 4096 x 4096 with 5 rows (5.0 times as long); 4096 x 4096 with 4 rows (4.0 "
        "times as long); 4096 x 4096 with 3 rows (3.0 times as long); and 1 more of the table."
    )
    assert words[-1] == "int4 saves memory here, not time: keep the float model where it fits."
    assert len(words) == 3


def test_int8_helps_some_of_the_slow_rows() -> None:
    words = advice([timing(128, 10, 20, 12), timing(512, 10, 20, 4)])
    assert (
        'awq_ext.set_compute_dtype(model, "int8") makes it 2.5 times as fast as float with 512 rows, or more.'
        in words[1]
    )


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        ((10, 2), (10, 10), ""),
        ((10, 2), (10, 13), "int4 is slower than bf16 here for 512 rows (1.3 times as long)"),
        ((10, 25), (10, 5), "int4 is slower than bf16 here for 1 row (2.5 times as long)"),
        ((10, 25), (10, 13), "here for 1 row (2.5 times as long) and for 512 rows (1.3 times as long): awq-ext bench"),
    ],
)
def test_one_sentence(few: tuple[float, float], many: tuple[float, float], expected: str) -> None:
    took = {rows: dict(zip(("float", "int4"), pair, strict=True)) for rows, pair in ((1, few), (512, many))}
    said = one_sentence(took)
    assert expected in said and bool(said) == bool(expected)
