"""``awq-ext convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..reporting.readers import DEFAULT_FORMAT
from .console import console_for, one_line_errors
from .options.checks import check_directory, check_format, check_size
from .options.types import OverwriteFloat, Revision, Token, Verify


@one_line_errors
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Directory, .gguf file, or ORG/NAME on the hub, of a quantized checkpoint, in any format.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Directory to write, new or empty; gguf puts model.gguf into it.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            callback=check_format,
            help="awq, gemv, gemv_fast, llm-awq, compressed-tensors, compressed-tensors-w8a8, gptq, modelopt, gguf, mlx or "
            "native (docs/formats.md).",
        ),
    ] = DEFAULT_FORMAT,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a quantized checkpoint in DST (never a float one).")
    ] = False,
    overwrite_float: OverwriteFloat = None,
    revision: Revision = None,
    token: Token = None,
    max_shard_size: Annotated[
        str, typer.Option(callback=check_size, help="Begin another file beyond this size.")
    ] = "5GB",
    verify: Verify = True,
) -> None:
    """Convert a quantized checkpoint to another format, exactly: codes, scales and zeros stay what they are.

    No model is built and nothing is quantized again. Where a format cannot hold the checkpoint, all reasons are listed and
    nothing is written. What is written is a directory, whatever the source: with config and tokenizer, also from a .gguf file.

    Example: awq-ext convert Qwen2.5-7B-Instruct-AWQ qwen-ct --format compressed-tensors
    """
    from ..checkpoints.convert import convert as run
    from .hf import folder as folder_of_source
    from .hf import tell_readers

    covered = check_directory(target, overwrite, overwrite_float, source)
    folder = run(folder_of_source(source, revision, token), target, format, max_shard_size, covered, verify)
    tell_readers(console_for(None), folder, format)
