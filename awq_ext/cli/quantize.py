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
    Field,
    Head,
    JsonPath,
    ModelDir,
    OverwriteFloat,
    Samples,
    Seed,
    SeqLen,
    Settings,
    Threads,
    check_directory,
    check_format,
    check_group_size,
    check_method,
    check_output,
    check_report_extra,
    console_for,
    one_line_errors,
    parse_setting,
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
        str,
        typer.Option(
            callback=check_method,
            help="awq (searched scales), gptq (error feedback), awq+gptq, or rtn (rounding to nearest).",
        ),
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
    head: Head = None,
    field: Field = None,
    samples: Samples = 32,
    seed: Seed = 0,
    seq_len: SeqLen = 512,
    skip: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Layers that stay float, such as '*.router' or 're:.*[.][01][.]mlp.*', beside the output layer, which does "
            "unless --head says otherwise. May be repeated.",
        ),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    dtype: Dtype = "auto",
    html: Annotated[
        Path | None, typer.Option("--report", callback=check_output, help="Also write the report as an HTML page.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            is_eager=True,
            help="Write into a directory that is not empty, replacing a quantized model (never a float one), and over the report.",
        ),
    ] = False,
    overwrite_float: OverwriteFloat = None,
    threads: Threads = None,
    json_path: JsonPath = None,
) -> None:
    """Quantize a Hugging Face model to int4.

    The calibration text decides which channels are protected: take a few dozen windows of the traffic you serve (prompts with
    their answers, in the model's chat format), not only prose. [bold]awq-ext compare[/bold] tells which method suits it best.

    Example: awq-ext quantize ./Llama ./Llama-int4 --calib prompts.jsonl --calib code.txt --group-size 64

    OUT holds config, tokenizer, weights, the report and a model card. Layouts without a place for scales that are applied at run
    time get a model whose scales are all folded (fold=always). What the layout cannot hold, such as widths that the group size does
    not divide, is said before the work begins.
    """
    from .. import quantize as quantize_model
    from ..checkpoints.formats import LAYOUTS
    from . import hf, texts

    covered = check_directory(out_dir, overwrite, overwrite_float, model_dir)
    if html is not None:
        check_report_extra()
    fold = "auto" if LAYOUTS[format].run_time_scales else "always"
    _refuse_other_bits(settings)
    chosen = read_settings(
        {"method": method, "group_size": group_size, "fold": fold, "seq_len": seq_len}, settings, skip, head
    )
    set_threads(threads)
    console = console_for(json_path)
    model_dir = hf.folder(model_dir)
    tokenizer = hf.load_tokenizer(model_dir)
    batches = texts.drawn_windows(calib, tokenizer, samples, seq_len, field, seed)
    model = hf.load_model(model_dir, dtype)
    hf.note_lengths(model, batches, samples)
    hf.check_format(model, batches[0], format, chosen)
    quantize_model(model, batches, **chosen)
    hf.save_model(model, out_dir, format, covered)
    report = model.awq_report
    if html is not None:
        report.to_html(html, overwrite)
    console.print(escape(report.summary()), soft_wrap=True)
    hf.tell_readers(console, out_dir, format)
    write_json({"out": str(out_dir), "format": format, "report": report.to_dict()}, json_path)


def _refuse_other_bits(settings: list[str]) -> None:
    """Say where to try what no quantized directory can hold: other bits, and weights that are only rounded."""
    from ..config import understood

    try:
        asked = understood(dict(map(parse_setting, settings)))
    except TypeError:
        return  # read_settings says what is wrong
    if asked.get("packed") is False or asked.get("bits", 4) in (2, 3, 5, 6, 7):
        bits = asked.get("bits", 4)
        raise typer.BadParameter(
            f"directories hold 4 or 8 bits, packed. What {bits} bits cost: awq-ext compare MODEL --calib ... --traffic ... "
            f"--set bits={bits} --set packed=false. The weights rounded to {bits} bits as a float model, no smaller: in Python "
            f"awq_ext.quantize(model, calib, bits={bits}, packed=False), then model.save_pretrained(OUT). "
            'Some layers at 8 bits: --format native --set \'per_layer={"*.down_proj": {"bits": 8}}\'',
            param_hint="--set",
        )
