"""The ``awq-ext`` command: a module for each subcommand, each a thin shell around a function of the package.

What only one command needs is imported inside it, so that ``--help`` is quick and extras stay optional.
"""

from __future__ import annotations

import inspect as python_inspect
import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import bench, compare, convert, demo, doctor, eval, inspect, quantize, report

__all__ = ["app", "main"]
app = typer.Typer(
    name="awq-ext",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="rich",
    help=(
        "Activation-aware Weight Quantization: models with 4-bit weights and 16- or 32-bit activations.\n\n"
        "[bold]Start here[/bold]\n\n"
        "awq-ext demo      see it work in less than a minute; nothing is downloaded\n\n"
        "awq-ext doctor    see which kernels this machine uses, and whether they compute what they should\n\n"
        "[bold]Your own model[/bold], a Hugging Face directory (pip install 'awq-ext\\[hf]')\n\n"
        "awq-ext compare   which method loses least on your text?\n\n"
        "awq-ext quantize  quantize with it\n\n"
        "awq-ext eval      score the result\n\n"
        "awq-ext report    read what was done to every layer\n\n"
        "awq-ext convert   convert it for other tools\n\n"
        "[bold]In Python[/bold]\n\n"
        "model = awq_ext.quantize(model, calib_loader)\n\n"
        "Exit codes: 0 done, 1 failed (one line says why), 2 a wrong option, 130 interrupted."
    ),
)


TYPICAL = """\
awq-ext quantize MODEL OUT --calib TEXT.jsonl     quantize a Hugging Face model, and see how far the result is from it
awq-ext eval OUT TEXT.txt --reference MODEL       score the result on a text of yours
awq-ext demo                                      see it work in less than a minute; nothing is downloaded
"""


def _tell_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"awq-ext {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(f"{TYPICAL}\nawq-ext -h tells of all commands, awq-ext quantize -h of one.")
        raise typer.Exit(code=2)


class _Command(TyperCommand):
    """A command that says what to give where the calibration text is missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as problem:
            if type(problem).__name__ == "MissingParameter" and problem.param and problem.param.name == "calib":
                problem.message = "Give a text file, or --calib builtin for texts that ship with the package."
            raise


for _module, _name in (
    (quantize, "quantize"),
    (compare, "compare"),
    (eval, "eval"),
    (report, "report"),
    (inspect, "inspect"),
    (convert, "convert"),
    (bench, "bench"),
    (doctor, "doctor"),
    (demo, "demo"),
):
    _command = getattr(_module, _name)
    # a terminal has its own width: lines are broken there, not where the docstring has them
    _help = re.sub(r"(?<!\n)\n(?!\n)", " ", python_inspect.cleandoc(_command.__doc__))
    app.command(_name, cls=_Command, help=_help)(_command)


def main() -> None:
    """Entry point of the ``awq-ext`` script."""
    app()
