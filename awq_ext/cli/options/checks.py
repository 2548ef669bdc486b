"""Checks of what options are given: a usage error says what is wrong before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

DTYPES = ("auto", "bfloat16", "float16", "float32")
PAGES = (".html", ".htm")


def check_group_size(value: int | None) -> int | None:
    """Check that AwqConfig knows a group size, if one is given; else a usage error (exit code 2)."""
    from ...config import GROUP_SIZES

    if value is not None and value not in GROUP_SIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))} (-1: one group a row)")
    return value


def check_source(value: Path | None) -> Path | None:
    """Check that a model may be there: a directory, a GGUF file, or what looks like a name on the hub; else a usage error."""
    from ...checkpoints.gguf.single import is_gguf
    from ...integrations.hub import is_name

    name = str(value).partition("@")[0]
    if value is not None and value.suffix.lower() == ".gguf" and not value.exists():
        raise typer.BadParameter(f"{value} does not exist (a file on the Hugging Face hub has to be downloaded first)")
    if value is None or value.is_dir() or is_gguf(value) or ("/" in name and is_name(name)):
        return value
    if value.exists():
        raise typer.BadParameter(f"{value} is a file, a directory is needed (or a .gguf file)")
    raise typer.BadParameter(f"{value} does not exist, and is no name on the Hugging Face hub (ORG/NAME)")


def check_format(value: str) -> str:
    """Check that awq_ext knows a layout; else a usage error (exit code 2)."""
    from ...checkpoints.formats import LAYOUTS

    return checked(value, LAYOUTS)


def check_method(value: str | None) -> str | None:
    """Check that there is such a method; else a usage error."""
    from ...config import EFFORTS, METHODS

    if value is not None and value.lower() in EFFORTS:  # compare takes both by one option
        raise typer.BadParameter(f"{value} is an effort, no method: give --effort {value.lower()}")
    return None if value is None else checked(value, METHODS)


def check_calib(value: list[Path]) -> list[Path]:
    """Check that texts are there, or built in; else a usage error."""
    from ..texts import is_builtin

    for path in value:
        if not (path.is_file() or is_builtin(path)):
            raise typer.BadParameter(f"File '{path}' {'is a directory' if path.is_dir() else 'does not exist'}.")
    return value


def check_effort(value: str | None) -> str | None:
    """Check that there is such an effort; else a usage error."""
    from ...config import EFFORTS

    return None if value is None else checked(value, EFFORTS)


def check_head(value: str | None) -> str | None:
    """Check that an output layer can be that; else a usage error."""
    from ...config import HEADS

    return None if value is None else checked(value, HEADS)


def check_dtype(value: str) -> str:
    """Check that a model can be computed in this dtype; else a usage error."""
    return checked(value, DTYPES)


def check_size(value: str | None) -> str | None:
    """Check that a text is a size of files or of memory, if one is given; else a usage error."""
    from ...checkpoints.write import parse_size

    try:
        if value is not None:
            parse_size(value)
    except ValueError:
        raise typer.BadParameter(
            f"{value!r} is no size: give bytes, or a number with a unit (KB, MB, GB, TB, KiB, MiB or GiB), such as 12GB"
        ) from None
    return value


def checked(value: str, choices: Iterable[str], option: str | None = None) -> str:
    """Find a choice however its letters are written; else a usage error that names the nearest.

    option: what the error names; None in a callback of an option, where it is known.
    """
    from ...config import did_you_mean, nearest_choice

    choices = list(choices)
    wanted = value.lower()
    if wanted not in choices:
        meant = did_you_mean(nearest_choice(wanted, choices))
        raise typer.BadParameter(f"{value} is not one of {', '.join(choices)}{meant}", param_hint=option)
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
    from ...checkpoints.write import check_target

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
    except (PermissionError, NotADirectoryError) as error:
        raise typer.BadParameter(f"{out}: {error.strerror}", param_hint="OUT") from None
    return covered


def check_report_extra() -> None:
    """Raise ImportError, before the work, where an HTML report could not be made."""
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise ImportError(f"an HTML report needs {' and '.join(missing)}: pip install 'awq-ext[report]'")
