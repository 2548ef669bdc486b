"""Share options, their checks, and the output of figures and errors between commands."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..reporting.figures import as_json

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float16", "float32")
PAGES = (".html", ".htm")
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def fail(problem: object) -> typer.Exit:
    """Print one line on what is wrong; raise the result for exit code 1."""
    say("[red]error:[/red] " + escape(str(problem)))
    return typer.Exit(code=1)


def say(text: str) -> None:
    """Print a line on standard error, in rich's markup."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print each distinct warning once, as one line: the line of code that Python would name is none of the user's."""
    told: set[str] = set()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
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


def check_group_size(value: int | None) -> int | None:
    """Check that AwqConfig knows a group size, if one is given; else a usage error (exit code 2)."""
    from ..config import GROUP_SIZES

    if value is not None and value not in GROUP_SIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))} (-1: one group a row)")
    return value


def check_source(value: Path | None) -> Path | None:
    """Check that a model may be there: a directory, or what looks like a name on the hub; else a usage error (exit code 2)."""
    from ..integrations.hub import is_name

    name = str(value).partition("@")[0]
    if value is None or value.is_dir() or ("/" in name and is_name(name)):
        return value
    if value.exists():
        raise typer.BadParameter(f"{value} is a file, a directory is needed")
    raise typer.BadParameter(f"{value} does not exist, and is no name on the Hugging Face hub (ORG/NAME)")


def check_format(value: str) -> str:
    """Check that awq_ext knows a layout; else a usage error (exit code 2)."""
    from ..checkpoints.formats import LAYOUTS

    return _checked(value, LAYOUTS)


def check_method(value: str) -> str:
    """Check that there is such a method; else a usage error."""
    from ..config import METHODS

    return _checked(value, METHODS)


def check_head(value: str | None) -> str | None:
    """Check that an output layer can be that; else a usage error."""
    from ..config import HEADS

    return None if value is None else _checked(value, HEADS)


def check_dtype(value: str) -> str:
    """Check that a model can be computed in this dtype; else a usage error."""
    return _checked(value, DTYPES)


def check_size(value: str) -> str:
    """Check that a text is a size of files; else a usage error."""
    from ..checkpoints.write import parse_size

    try:
        parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def _checked(value: str, choices: Iterable[str]) -> str:
    """Find a choice however its letters are written; else a usage error that names the nearest."""
    from ..config import did_you_mean

    choices = list(choices)
    wanted = value.lower()
    if wanted not in choices:
        raise typer.BadParameter(f"{value} is not one of {', '.join(choices)}{did_you_mean(wanted, choices)}")
    return wanted


def check_device(value: str) -> str:
    """Check that torch can compute on a device; else a usage error."""
    import torch

    try:
        if torch.device(value).type != "meta":  # which holds no values
            torch.zeros(1, device=value)
            return value
        reason = "it holds no values"
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise typer.BadParameter(f"torch cannot compute on {value!r} here: {reason}")


def check_output(context: typer.Context, value: Path | None) -> Path | None:
    """Check that a file can be written, before the work rather than after, and is new; "-" is standard output."""
    if value is None or str(value) == "-":
        return value
    if value.is_dir() or not value.absolute().parent.is_dir():
        raise typer.BadParameter(f"{value} cannot be written: give a file in a folder that exists")
    if not os.access(value if value.exists() else value.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{value} cannot be written: no permission")
    if value.is_file() and not context.params.get("overwrite"):
        raise typer.BadParameter(f"{value} exists: give another, or --overwrite")
    return value


def check_page(context: typer.Context, value: Path | None) -> Path | None:
    """Check that a page can be written: see :func:`check_output`; a usage error for a name of another kind of file."""
    if value is not None and value.suffix.lower() not in PAGES:
        raise typer.BadParameter(f"{value}: the report is a web page: give a name that ends in {' or '.join(PAGES)}")
    return check_output(context, value)


def check_directory(out: Path, overwrite: bool, overwrite_float: Path | None, source: Path) -> Any:
    """Check that a directory can be made and written when the work is done, and what it replaces; else a usage error.

    Returns what ``overwrite=`` of the writers is to be.
    """
    from ..checkpoints.write import check_target

    covered = overwrite if overwrite_float is None else overwrite_float
    if out.resolve() == source.resolve():
        raise typer.BadParameter(f"what is in {out} would be lost: give another directory", param_hint="OUT")
    if out.is_dir() and any(out.iterdir()) and covered is False:
        raise typer.BadParameter(f"{out} is not empty: give another, or --overwrite", param_hint="OUT")
    try:
        check_target(out, covered, [source])
    except ValueError as error:
        text = str(error).replace(f"overwrite={str(out)!r}", f"--overwrite-float {out}")
        raise typer.BadParameter(text, param_hint="OUT") from None
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{out} cannot be made: {there} is a file", param_hint="OUT")
    # it is made beside its place and moved there whole
    where = there.parent if there == out.absolute() else there
    if not os.access(where, os.W_OK):
        raise typer.BadParameter(f"{out} cannot be made: no permission to write to {where}", param_hint="OUT")
    return covered


def check_report_extra() -> None:
    """Raise ImportError, before the work, where an HTML report could not be made."""
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise ImportError(f"an HTML report needs {' and '.join(missing)}: pip install 'awq-ext[report]'")


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``clip=false`` to ("clip", False): the value is JSON or a word. A usage error unless it is FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE, such as clip=false")
    try:
        return name, json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except ValueError:
        return name, value  # a word, such as auto


def parse_method(text: str) -> dict[str, Any]:
    """Parse ``awq,clip=false,label=no clip`` to fields of AwqConfig and a label."""
    name, *fields = text.split(",")
    return {"label": text, "method": name} | dict(parse_setting(field) for field in fields)


def parse_per_layer(text: str) -> dict[str, dict[str, Any]]:
    """Parse ``*.down_proj:bits=8,group_size=64``, or JSON, to fields by pattern; a usage error for anything else."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint="--per-layer") from None
        if all(isinstance(fields, dict) for fields in found.values()):
            return found
    elif split := re.fullmatch(r"(.+):([^:=]+=[^:]*)", text):  # the last colon: regular expressions hold others
        return {split[1]: dict(map(parse_setting, split[2].split(",")))}
    raise typer.BadParameter(
        f"{text!r} is not PATTERN:FIELD=VALUE, such as '*.down_proj:bits=8', nor JSON, such as "
        '\'{"*.down_proj": {"bits": 8}}\'',
        param_hint="--per-layer",
    )


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


def read_settings(
    fields: Mapping[str, Any],
    more: Iterable[str],
    skip: Iterable[str] = (),
    per_layer: Iterable[str] = (),
    head: str | None = None,
) -> dict[str, Any]:
    """Read fields of AwqConfig from options and ``--set``, checked before a model is loaded for nothing; else a usage error.

    fields: those that are None keep their default. per_layer: as :func:`parse_per_layer` reads it, added to that of ``more``.
    """
    from ..config import AwqConfig, understood

    try:
        chosen = {name: value for name, value in fields.items() if value is not None}
        chosen |= understood(dict(map(parse_setting, more)))
        for given in map(parse_per_layer, per_layer):
            before = chosen.get("per_layer", {})
            chosen["per_layer"] = {**before, **{name: {**before.get(name, {}), **given[name]} for name in given}}
        if head is not None:
            if "head" in chosen:
                raise ValueError(f"--head {head} sets head, which --set gives too ({chosen['head']}): leave one out")
            chosen["head"] = head
        if skip := tuple(skip):
            chosen["skip"] = (*AwqConfig.from_dict(chosen).skip, *skip)
        AwqConfig.from_dict(chosen)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    return chosen


ModelDir = Annotated[
    Path,
    typer.Argument(
        callback=check_source,
        metavar="MODEL",
        help="A Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION on the hub (downloaded once, to the hub's cache).",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub; the same as ORG/NAME@REVISION.")
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Access token of the hub, for gated and private models. Others can read it in the list of processes: HF_TOKEN in the "
        "environment, or `hf auth login`, keep it from them.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code beside the weights of a model with a class of its own. It can do whatever you can: read it first.",
    ),
]
Calib = Annotated[
    list[Path],
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Text to calibrate on: .txt, or .jsonl, .json, .csv or .parquet with 'text', 'messages', 'conversations' or "
        "'prompt' and 'completion'. May be repeated.",
    ),
]
Field = Annotated[
    str | None,
    typer.Option(help="The field or column that holds the text or the messages, in every file that has rows."),
]
Seed = Annotated[int, typer.Option(help="Of the places in the texts that the windows are drawn from.")]
Head = Annotated[
    str | None,
    typer.Option(
        callback=check_head,
        help="The output layer: float (as it is, the default), int8 or int4. Tied to the embedding, it gets a weight of its own.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of calibration text, drawn evenly over all of it.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens to score of each text; more make the intervals narrower.")]
Dtype = Annotated[
    str,
    typer.Option(callback=check_dtype, help="Compute in this dtype: auto (as stored), bfloat16, float16 or float32."),
]
Bits = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=8,
        help="Bits of a weight: 4 unless said otherwise, or 8; others only in compare.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(callback=check_device, help="Where to compute: cpu, cuda, cuda:1 or another device of torch's.")
]
PerLayer = Annotated[
    list[str],
    typer.Option(
        "--per-layer",
        metavar="PATTERN:FIELD=VALUE[,FIELD=VALUE...]",
        help="Other bits, group_size or method for some layers: '*.down_proj:bits=8,group_size=64', or JSON: "
        '\'{"*.down_proj": {"bits": 8}}\'. May be repeated; the first pattern that fits counts.',
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any other field of AwqConfig (its docstring explains them), such as clip=false, symmetric=true, damping=0.5, "
        "propagate=quantized, only='[\"*.mlp.*\"]'; AutoAWQ's w_bit, q_group_size and zero_point are "
        "understood too. May be repeated.",
    ),
]
OverwriteFloat = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Replace even float weights in OUT, which is named once more here. Those of the source never are.",
    ),
]
# eager: it is read before the options whose files it is about
Overwrite = Annotated[bool, typer.Option("--overwrite", is_eager=True, help="Replace files that are there.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads, instead of torch's choice.")]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=check_output, metavar="PATH", help="Also write the figures here; - is standard output."
    ),
]
