"""What several commands share: options, their checks, and how figures and errors come out."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")


def fail(problem: object) -> typer.Exit:
    """One line on what is wrong, and exit code 1."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(str(problem))}", soft_wrap=True)
    return typer.Exit(code=1)


def one_line_errors(command: Callable[..., T]) -> Callable[..., T]:
    """Errors that say what a user can do about them come out as one line; bugs keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> T:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as problem:
            if isinstance(problem, (NotImplementedError, typer.Exit)):  # both are RuntimeErrors
                raise
            raise fail(problem) from problem

    return run


def check_group_size(value: int) -> int:
    """A group size that AwqConfig knows, else a usage error (exit code 2)."""
    from ..config import GROUP_SIZES

    if value not in GROUP_SIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))} (-1: one group a row)")
    return value


def check_format(value: str) -> str:
    """A layout that awq_ext knows, else a usage error (exit code 2)."""
    from ..formats import LAYOUTS

    if value not in LAYOUTS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(LAYOUTS)}")
    return value


def check_output(value: Path | None) -> Path | None:
    """A file that can be written, checked before the work rather than after; "-" is standard output."""
    if value is not None and str(value) != "-" and (value.is_dir() or not value.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{value} cannot be written: give a file in a folder that exists")
    return value


def parse_setting(text: str) -> tuple[str, Any]:
    """``clip=false`` -> ("clip", False). A usage error unless it has the form FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE, such as clip=false")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, int(value)
    except ValueError:
        return name, value


def parse_method(text: str) -> dict[str, Any]:
    """``awq,clip=false,label=no clip`` -> fields of AwqConfig, and its label."""
    name, *fields = text.split(",")
    return {"label": text, "method": name} | dict(parse_setting(field) for field in fields)


def fact_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and what they are, a line each."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(name, escape(value))
    return table


def console_for(json_path: Path | None) -> Console:
    """Where the human output goes: standard error when the figures go to standard output."""
    return Console(stderr=json_path is not None and str(json_path) == "-")


def write_json(figures: Mapping[str, Any], path: Path | None) -> None:
    """The figures to a file, or to standard output for "-"."""
    if path is None:
        return
    text = json.dumps(figures, indent=1, default=str) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def set_threads(count: int | None) -> None:
    """Use so many threads; None leaves torch's choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def read_settings(fields: Mapping[str, Any], more: Iterable[str]) -> dict[str, Any]:
    """Fields of AwqConfig from options and from ``--set``, checked before a model is loaded for nothing."""
    from ..config import AwqConfig

    chosen = {**fields, **dict(map(parse_setting, more))}
    AwqConfig.from_dict(chosen)
    return chosen


ModelDir = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, metavar="MODEL", help="A Hugging Face directory on this disk.")
]
Calib = Annotated[
    list[Path],
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Text to calibrate on: .txt, or .jsonl with 'text' or 'messages'. May be repeated.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens to score of each text; more make the intervals narrower.")]
Dtype = Annotated[str, typer.Option(help="Compute in this dtype: auto (as stored), bfloat16, float16 or float32.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of AwqConfig, such as clip=false.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads, instead of torch's choice.")]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=check_output, metavar="PATH", help="Also write the figures here; - is standard output."
    ),
]
