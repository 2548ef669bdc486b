"""``awq-ext``: the command line. Each command is a thin shell around a function of the package.

What only one command needs is imported inside it.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# fp32 sums of some hundred terms in another order differ by about 1e-6; bf16 products would by 1e-2
SELF_TEST_TOLERANCE = 1e-4

app = typer.Typer(
    name="awq-ext",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help=(
        "Activation-aware Weight Quantization: models with 4-bit weights and 16- or 32-bit activations.\n\n"
        "[bold]Start here[/bold]\n\n"
        "awq-ext demo      see it work in about a minute; nothing is downloaded\n\n"
        "awq-ext doctor    see which kernels this machine uses, and whether they compute what they should\n\n"
        "[bold]In Python[/bold]\n\n"
        "model = awq_ext.quantize(model, calib_loader)"
    ),
)


def fail(console: Console, problem: object) -> typer.Exit:
    """One line on what is wrong, and exit code 1."""
    console.print(f"[red]error:[/red] {escape(str(problem))}", soft_wrap=True)
    return typer.Exit(code=1)


def check_group_size(value: int) -> int:
    """A group size that AwqConfig knows, else a usage error (exit code 2)."""
    from .config import GROUP_SIZES

    if value not in GROUP_SIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))} (-1: one group a row)")
    return value


def check_json_path(value: Path | None) -> Path | None:
    """A path that can be written, checked before the work rather than after."""
    if value is not None and (value.is_dir() or not value.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{value} cannot be written: give a file in a folder that exists")
    return value


@app.command()
def demo(
    tokens: Annotated[
        int, typer.Option(min=256, help="Held-out bytes to score; more make the comparison surer.")
    ] = 131_072,
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = -1,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", callback=check_json_path, metavar="PATH", help="Also write the figures here."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, instead of torch's choice.")] = None,
) -> None:
    """Quantize a small language model that comes with the package, with RTN and AWQ, and compare them.

    The model predicts Python source byte by byte. It is calibrated and scored on parts of your own Python's standard
    library that it was not trained on. Every printed figure is measured while you wait.
    """
    import torch

    from .demo.data import NoSourceError
    from .demo.display import run_and_show

    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        run_and_show(tokens, group_size, json_path, console)
    except NoSourceError as problem:
        raise fail(Console(stderr=True), problem) from None


def facts() -> list[tuple[str, str]]:
    """(name, value) of what decides which code runs."""
    import torch

    from . import _C, __version__, _abi

    return [
        ("awq_ext", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch installed", torch.__version__),
        ("torch built against", _abi.built_version() or "unknown"),
        ("kernels in use", _C.isa()),
        ("kernels available", ", ".join(_C.available_isas())),
        ("threads", str(torch.get_num_threads())),
    ]


def wrong_kernels() -> list[str]:
    """Tries each level of kernels on a small layer: a line for every one whose result is not the reference's."""
    import torch

    from . import _C, QuantLinear, reference

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 192, generator=generator), torch.randn(5, 192, generator=generator)
    codes, scales, zeros = reference.quantize_weight(weight, 64)
    linear = torch.nn.Linear(192, 96, bias=False, device="meta")
    layer = QuantLinear.from_packed(linear, reference.pack_int4(codes), scales, zeros, 64)
    expected = x @ reference.dequantize_weight(codes, scales, zeros, 64).T
    chosen, problems = _C.isa(), []
    try:
        for level in _C.available_isas():
            _C.set_isa(level)
            error = ((layer(x) - expected).norm() / expected.norm()).item()
            if not error < SELF_TEST_TOLERANCE:
                problems.append(f"the {level} kernels are off by {error:.2g}")
    finally:
        _C.set_isa(chosen)
    return problems


@app.command()
def doctor() -> None:
    """Print versions, kernels and threads, and try the kernels on a small layer; exit code 1 if something is wrong.

    AWQ_EXT_ISA=scalar (or another of the available levels) in the environment chooses other kernels.
    """
    console = Console()
    table = Table.grid(padding=(0, 2))
    for name, value in facts():
        table.add_row(name, escape(value))
    console.print(table)
    if problems := wrong_kernels():
        raise fail(Console(stderr=True), "; ".join(problems))
    console.print("[green]every level of kernels computes what the reference computes[/green]")


def check_format(value: str) -> str:
    """A layout that awq_ext knows, else a usage error (exit code 2)."""
    from .formats import LAYOUTS

    if value not in LAYOUTS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(LAYOUTS)}")
    return value


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of a quantized checkpoint, of any layout.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Directory to write; what is a checkpoint in it is replaced.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            callback=check_format,
            help="awq, gemv, gemv_fast, llm-awq, compressed-tensors, gptq, modelopt or native (docs/formats.md).",
        ),
    ] = "awq",
    max_shard_size: Annotated[str, typer.Option(help="Begin another file beyond this size.")] = "5GB",
) -> None:
    """Convert a quantized checkpoint to another layout, exactly: codes, scales and zeros stay what they are.

    No model is built and nothing is quantized again. Where a layout cannot hold the checkpoint, all reasons are listed and
    nothing is written.

    awq-ext convert Qwen2.5-7B-Instruct-AWQ qwen-ct --format compressed-tensors
    """
    from .convert import convert as run
    from .formats import CheckpointError

    try:
        folder = run(source, target, format, max_shard_size)
    except (CheckpointError, ValueError, OSError) as problem:
        raise fail(Console(stderr=True), problem) from None
    Console().print(f"{escape(str(folder))}: {format}", soft_wrap=True)


def main() -> None:
    """Entry point of the ``awq-ext`` script."""
    app()
