"""``awq-ext demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import check_group_size, check_output, one_line_errors, set_threads


@one_line_errors
def demo(
    tokens: Annotated[
        int, typer.Option(min=256, help="Held-out bytes to score; more make the comparison surer.")
    ] = 131_072,
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = -1,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=check_output, metavar="PATH", help="Also write the figures here.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, instead of torch's choice.")] = None,
) -> None:
    """Quantize a small language model that comes with the package, with RTN and AWQ, and compare them.

    The model predicts Python source byte by byte. It is calibrated and scored on parts of your own Python's standard
    library that it was not trained on. Every printed figure is measured while you wait.
    """
    from ..demo.display import run_and_show

    set_threads(threads)
    run_and_show(tokens, group_size, json_path, Console())
