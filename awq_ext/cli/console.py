"""What commands print, and how they end: tables, JSON, and one line for an error."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..reporting.figures import as_json
from ..reporting.origin import command_text
from .options.words import in_options

T = TypeVar("T")
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def fail(problem: object) -> typer.Exit:
    """Print one line on what is wrong; raise the result for exit code 1."""
    say("[red]error:[/red] " + escape(in_options(str(problem))))
    return typer.Exit(code=1)


def say(text: str) -> None:
    """Print a line on standard error, in rich's markup."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print each distinct warning once, as one line: the line of code that Python would name is none of the user's."""
    told: set[str] = set()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        text = in_options(" ".join(str(message).split()))
        if text not in told:
            told.add(text)
            say("[yellow]warning:[/yellow] " + escape(text))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def one_line_errors(command: Callable[..., T]) -> Callable[..., T]:
    """Print warnings, and errors that a user can do something about, as one line each; bugs keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> T:
        try:
            with _one_line_warnings():
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted: no file is left half-written")
            raise typer.Exit(code=INTERRUPTED) from None
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as problem:
            if isinstance(problem, (NotImplementedError, typer.Exit)):  # both are RuntimeErrors
                raise
            raise fail(problem) from problem

    return run


def command_line(context: typer.Context) -> str:
    """Write the running command with the arguments and options that were given, without the token and without folders."""
    words = ["awq-ext", context.info_name or ""]
    for param in context.command.params:
        name, value = param.name or "", context.params.get(param.name or "")
        given = context.get_parameter_source(name)
        if name == "token" or given is None or given.name != "COMMANDLINE":
            continue
        option = [] if param.param_type_name == "argument" else [param.opts[0]]
        for one in value if isinstance(value, (list, tuple)) else (value,):
            words += option if one is True else [*option, str(one)]
    return command_text(words)


def fact_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Make a table of names and what they are, one on a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(name, escape(value))
    return table


def console_for(json_path: Path | None) -> Console:
    """Choose where the human output goes: to standard error when the figures go to standard output."""
    return Console(stderr=json_path is not None and str(json_path) == "-", highlight=False)


def write_json(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write the figures to a file, or to standard output for "-"."""
    if path is None:
        return
    text = as_json(figures)
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def set_threads(count: int | None) -> None:
    """Use so many threads; None leaves torch's choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)
