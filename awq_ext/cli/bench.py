"""``awq-ext bench``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..reporting.tables import Cell, Table, counted, shared_scales
from .console import console_for, one_line_errors, set_threads, write_json
from .options.checks import check_group_size
from .options.types import JsonPath, Overwrite, Threads

if TYPE_CHECKING:
    from ..evaluation.advice import Timing

SHAPES = ["4096x4096"]
ROWS = [1, 8, 128]
HEADER = ["in x out", "rows", "float, us", "int4, us", "int8, us", "times faster", "int8 times faster"]


def parse_shape(text: str) -> tuple[int, int]:
    """Parse ``4096x11008`` to (in_features, out_features)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not IN_FEATURESxOUT_FEATURES, such as 4096x4096", param_hint="--shape")
    return int(parts[0]), int(parts[1])


@one_line_errors
def bench(
    shape: Annotated[
        list[str], typer.Option(metavar="INxOUT", help="Sizes of a Linear: in_features x out_features.")
    ] = SHAPES,
    rows: Annotated[
        list[int], typer.Option(min=1, help="Tokens at once: 1 is decoding, hundreds are the prefill of a prompt.")
    ] = ROWS,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32: activations and the float Linear.")
    ] = "bfloat16",
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = 128,
    seconds: Annotated[float, typer.Option(min=0.05, help="Time for each measurement.")] = 1.0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
) -> None:
    """Time the int4 layer against torch's Linear on this machine, in turns.

    Will my model be faster? Where a Linear's weight does not fit in the processor's cache, decoding (1 row) is limited by how fast
    the memory is read, and int4 reads less. The best of many calls counts. The columns "int8" are the int4 layer with
    compute_dtype="int8", which rounds activations to eight bits. Where int4 is slower than float, a note below the table says what
    helps.

    Example: awq-ext bench --shape 2048x8192 --rows 1 --rows 64
    """
    import torch

    from ..evaluation.advice import Timing, advice
    from ..evaluation.cost import race, rotating_layers

    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype!r}: choose bfloat16, float16 or float32", param_hint="--dtype")
    set_threads(threads)
    shapes = [parse_shape(text) for text in shape]
    console = console_for(json_path)
    timings = []
    for in_features, out_features in shapes:
        runners = rotating_layers(in_features, out_features, group_size, getattr(torch, dtype))
        for count in rows:
            x = torch.randn(count, in_features).to(getattr(torch, dtype))
            took = race({name: partial(run, x) for name, run in runners.items()}, seconds)
            timings.append(Timing(in_features, out_features, count, took["float"], took["int4"], took["int8"]))
    title = f"{dtype}, {shared_scales(group_size)}, {counted(torch.get_num_threads(), 'thread')}"
    console.print(Table(title, HEADER, [_cells(timing) for timing in timings]).to_rich())
    words = advice(timings)
    for line in words:
        console.print(line, markup=False, highlight=False)
    figures = [_figures(timing) | {"dtype": dtype} for timing in timings]
    threads_used = torch.get_num_threads()
    write_json({"threads": threads_used, "group_size": group_size, "layers": figures, "advice": words}, json_path)


def _cells(timing: Timing) -> list[Cell]:
    times = (timing.linear, timing.int4, timing.int8)
    texts = [f"{timing.in_features} x {timing.out_features}", str(timing.rows), *(f"{t * 1e6:,.0f}" for t in times)]
    return [Cell(text) for text in (*texts, *(f"{timing.linear / t:.2f}" for t in times[1:]))]


def _figures(timing: Timing) -> dict[str, Any]:
    took = {"float": timing.linear, "int4": timing.int4, "int8": timing.int8}
    sizes = {"in_features": timing.in_features, "out_features": timing.out_features, "rows": timing.rows}
    return {**sizes, "seconds": took, "ratio": took["float"] / took["int4"], "int8_ratio": took["float"] / took["int8"]}
