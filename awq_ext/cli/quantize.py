"""``awq-ext quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..reporting.readers import DEFAULT_FORMAT
from .options import (
    Calib,
    Dtype,
    JsonPath,
    ModelDir,
    Samples,
    SeqLen,
    Settings,
    Threads,
    check_directory,
    check_format,
    check_group_size,
    check_output,
    check_report_extra,
    console_for,
    one_line_errors,
    read_settings,
    set_threads,
    write_json,
)


@one_line_errors
def quantize(
    model_dir: ModelDir,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Where the quantized model goes; made if need be.")],
    calib: Calib,
    method: Annotated[
        str, typer.Option(help="awq (searched scales), gptq (error feedback), awq+gptq, or rtn (rounding to nearest).")
    ] = "awq",
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = 128,
    format: Annotated[
        str,
        typer.Option(
            callback=check_format,
            help="Layout of OUT: awq and compressed-tensors are loaded by vLLM and Transformers, native by awq_ext; others in "
            "docs/formats.md.",
        ),
    ] = DEFAULT_FORMAT,
    samples: Samples = 32,
    seq_len: SeqLen = 512,
    skip: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN", help="Layers that stay float, such as '*.router'. The output layer always does."
        ),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    dtype: Dtype = "auto",
    html: Annotated[
        Path | None, typer.Option("--report", callback=check_output, help="Also write the report as an HTML page.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Write into a directory that is not empty.")] = False,
    threads: Threads = None,
    json_path: JsonPath = None,
) -> None:
    """Quantize a Hugging Face model to int4.

    The calibration text decides which channels are protected: take a few dozen windows of the traffic you serve (prompts with
    their answers, in the model's chat format), not only prose. [bold]awq-ext compare[/bold] tells which method suits it best.

    Example: awq-ext quantize ./Llama ./Llama-int4 --calib prompts.jsonl --calib code.txt --group-size 64

    OUT holds config, tokenizer, weights, the report and a model card. Layouts without a place for scales that are applied at run
    time get a model whose scales are all folded (fold=always). What the layout cannot hold is said before the work.
    """
    from .. import AwqConfig
    from .. import quantize as quantize_model
    from ..checkpoints.formats import LAYOUTS
    from . import hf

    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite):
        raise typer.BadParameter(f"{out_dir} is not empty: give another, or --overwrite", param_hint="OUT")
    if out_dir.resolve() == model_dir.resolve():
        raise typer.BadParameter("the float model would be lost: give another directory than MODEL", param_hint="OUT")
    check_directory(out_dir)
    if html is not None:
        check_report_extra()
    fold = "auto" if LAYOUTS[format].run_time_scales else "always"
    chosen = read_settings({"method": method, "group_size": group_size, "fold": fold, "seq_len": seq_len}, settings)
    if skip:
        chosen["skip"] = (*chosen.get("skip", AwqConfig().skip), *skip)
    if chosen.get("packed") is False:
        raise typer.BadParameter("a fake-quantized model is for experiments: use awq-ext compare", param_hint="--set")
    set_threads(threads)
    console = console_for(json_path)
    model_dir = hf.folder(model_dir)
    tokenizer = hf.load_tokenizer(model_dir)
    batches = hf.windows(calib, tokenizer, samples, seq_len)
    model = hf.load_model(model_dir, dtype)
    hf.note_lengths(model, batches, samples)
    hf.check_format(model, batches[0], format, chosen)
    quantize_model(model, batches, progress=console.is_terminal, **chosen)
    hf.save_model(model, out_dir, format)
    report = model.awq_report
    if html is not None:
        report.to_html(html)
    console.print(escape(report.summary()), soft_wrap=True)
    hf.tell_readers(console, out_dir, format)
    write_json({"out": str(out_dir), "format": format, "report": report.to_dict()}, json_path)
