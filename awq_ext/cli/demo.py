"""``awq-ext demo``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from .console import console_for, one_line_errors, set_threads, write_json
from .options.checks import check_group_size
from .options.types import JsonPath, Overwrite, Threads


@one_line_errors
def demo(
    tokens: Annotated[
        int, typer.Option(min=256, help="Held-out bytes to score; more make the divergence surer.")
    ] = 16_384,
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = -1,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
    threads: Threads = None,
) -> None:
    """Show in less than a minute whether int4 and AWQ are worth it: which rounding hurts, what AWQ saves, what a layer costs here.

    A small language model that comes with the package is quantized with RTN, AWQ and AWQ+GPTQ at 4 and at 3 bits. It predicts
    Python source byte by byte, and is calibrated and scored on parts of your own Python's standard library that it was not trained
    on. A layer of the size of an 8B model's is timed in bf16 and int4. Every printed figure is computed while you wait.
    """
    from ..demo.display import run_and_show

    set_threads(threads)
    console = console_for(json_path)
    result = run_and_show(tokens, group_size, console)
    write_json(result.to_dict(), json_path)
    if json_path is not None and str(json_path) != "-":
        console.print(f"[dim]figures written to {escape(str(json_path))}[/dim]")
