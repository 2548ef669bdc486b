"""Where int4 layers are slower than float ones on this machine, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A layer counts as slower from here on: the same call differs by some percent between two measurements
SLOWER = 1.05
_MOST_NAMED = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a layer: torch's Linear in float, the int4 layer, and that with ``compute_dtype="int8"``."""

    in_features: int
    out_features: int
    rows: int
    linear: float
    int4: float
    int8: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @property
    def slower(self) -> bool:
        return self.int4 > SLOWER * self.linear

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features} with {_rows([self.rows])} ({self.int4 / self.linear:.1f} times as long)"


def advice(timings: Sequence[Timing]) -> list[str]:
    """Say where int4 is slower than float, and what helps, by these figures alone; nothing where it is slower nowhere."""
    slow = [timing for timing in timings if timing.slower]
    if not slow:
        return []
    return [_where(slow), *_other_rows(timings, slow), _int8(slow), _float_model(timings, slow)]


def _where(slow: Sequence[Timing]) -> str:
    worst = sorted(slow, key=lambda timing: timing.linear / timing.int4)
    more = len(worst) - _MOST_NAMED
    named = "; ".join(map(str, worst[:_MOST_NAMED])) + (f"; and {more} more of the table" if more > 0 else "")
    return f"int4 is slower than the float Linear here: {named}."


def _other_rows(timings: Sequence[Timing], slow: Sequence[Timing]) -> Iterable[str]:
    """More rows at once, or fewer, of the same shape, where that takes less time for each row than float takes."""
    for shape in dict.fromkeys(timing.shape for timing in slow):
        here = [timing for timing in timings if timing.shape == shape]
        at = [timing for timing in slow if timing.shape == shape]
        # int4 against float at the slow rows, by time for each row: only then does it help to split or to gather them
        target = min(timing.linear / timing.rows for timing in at)
        good = [t.rows for t in here if not t.slower and t.int4 / t.rows * SLOWER < target]
        more = [rows for rows in good if rows > max(timing.rows for timing in at)]
        fewer = [rows for rows in good if rows < min(timing.rows for timing in at)]
        name = f"{shape[0]} x {shape[1]}"
        if more:
            yield f"More rows at once help {name}: {_rows(more)} take less time for each row. Run larger batches."
        if fewer:
            yield f"Fewer rows at once help {name}: {_rows(fewer)} take less time for each row. Split long inputs."


def _int8(slow: Sequence[Timing]) -> str:
    helped = [timing for timing in slow if timing.int8 * SLOWER < timing.linear]
    if not helped:
        return 'compute_dtype="int8" is not faster than float there either.'
    where = "there" if len(helped) == len(slow) else f"with {_rows(timing.rows for timing in helped)}"
    least = min(timing.linear / timing.int8 for timing in helped)
    return (
        f'awq_ext.set_compute_dtype(model, "int8") makes it {least:.1f} times as fast as float {where}, or more. '
        "It rounds activations to eight bits: check the result with awq-ext eval."
    )


def _float_model(timings: Sequence[Timing], slow: Sequence[Timing]) -> str:
    fast = [timing.rows for timing in timings if not timing.slower]
    if not fast:
        return "int4 saves memory here, not time: keep the float model where it fits."
    if min(timing.rows for timing in slow) > max(fast):
        return "Keep the float model for work that is mostly prefill (long prompts, batches, encoders), and int4 for generating."
    if max(timing.rows for timing in slow) < min(fast):
        return "Keep the float model for generating one token at a time, and int4 for prompts and batches."
    return "Measure your own shapes with --shape and --rows: where int4 is faster depends on both here."


def one_sentence(seconds: dict[int, dict[str, float]], dtype: str = "bf16") -> str:
    """Say for which numbers of rows int4 is slower than float; rows -> {"float": seconds, "int4": seconds}. "" where for none."""
    slow = {rows: took["int4"] / took["float"] for rows, took in seconds.items()}
    slow = {rows: ratio for rows, ratio in slow.items() if ratio > SLOWER}
    if not slow:
        return ""
    each = " and ".join(f"for {_rows([rows])} ({ratio:.1f} times as long)" for rows, ratio in slow.items())
    return f"int4 is slower than {dtype} here {each}: awq-ext bench tells what to do about it."


def _rows(counts: Iterable[int]) -> str:
    """Name numbers of rows: "1 row", "8, 32 and 128 rows"."""
    known = sorted(set(counts))
    if known == [1]:
        return "1 row"
    *before, last = map(str, known)
    return (f"{', '.join(before)} and {last}" if before else last) + " rows"
