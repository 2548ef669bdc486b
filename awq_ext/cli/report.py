"""``awq-ext report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .console import console_for, one_line_errors, write_json
from .options.checks import check_page
from .options.types import JsonPath, Overwrite


@one_line_errors
def report(
    model_dir: Annotated[Path, typer.Argument(exists=True, metavar="MODEL", help="A directory that awq-ext wrote.")],
    html: Annotated[
        Path | None,
        typer.Argument(callback=check_page, metavar="[HTML]", help="Write a page here (.html), self-contained."),
    ] = None,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
) -> None:
    """Show what quantizing did to every layer of a model: scales, losses, folds, clips, what stayed float and why.

    Without HTML it is a table in the terminal. The page has plots and needs no network (pip install 'awq-ext\\[report]').

    Example: awq-ext report ./Llama-int4 report.html
    """
    from ..checkpoints.saved import read_report

    if model_dir.is_file():
        raise typer.BadParameter(
            f"{model_dir} is a file, which holds no report: awq-ext quantize writes one into the directory that it makes. "
            "awq-ext inspect says what is in a .gguf file",
            param_hint="MODEL",
        )
    found = read_report(model_dir)
    console = console_for(json_path)
    if html is None:
        console.print(escape(str(found)), soft_wrap=True)
    else:
        found.to_html(html, overwrite)
        console.print(f"written to {escape(str(html))}")
    write_json(found.to_dict(), json_path)
