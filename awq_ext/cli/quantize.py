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
    Revision,
    Samples,
    Seed,
    SeqLen,
    Settings,
    Threads,
    Token,
    Tokens,
    Trust,
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
    traffic: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Text to score OUT on, not that of --calib: the distance from the float model, which is loaded once more for "
            "it, goes into the model card. May be repeated.",
        ),
    ] = [],  # noqa: B006
    tokens: Tokens = 8192,
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
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    json_path: JsonPath = None,
) -> None:
    """Quantize a Hugging Face model to int4.

    The calibration text decides which channels are protected: take a few dozen windows of the traffic you serve (prompts with
    their answers, in the model's chat format), not only prose. [bold]awq-ext compare[/bold] tells which method suits it best.

    With --traffic the result is scored too, and its model card says how far it is from the float model.

    Example: awq-ext quantize ./Llama ./Llama-int4 --calib prompts.jsonl --calib code.txt --group-size 64

    OUT holds config, tokenizer, weights, the report and a model card. Layouts without a place for scales that are applied at run
    time get a model whose scales are all folded (fold=always). What the layout cannot hold, such as widths that the group size does
    not divide, is said before the work begins.
    """
    from .. import quantize as quantize_model
    from ..checkpoints.formats import LAYOUTS
    from ..checkpoints.saved import record_scores
    from . import hf, texts
    from .eval import score

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
    named = hf.named_texts(traffic)
    texts.check_field(field, [*calib, *named.values()])
    model_dir = hf.folder(model_dir, revision, token)
    tokenizer = hf.load_tokenizer(model_dir, trust_remote_code)
    batches = texts.drawn_windows(calib, tokenizer, samples, seq_len, field, seed)
    scored = texts.windows_of(named, tokenizer, tokens, seq_len, field)
    model = hf.load_model(model_dir, dtype, trust_remote_code)
    hf.note_lengths(model, batches, samples)
    hf.check_format(model, batches[0], format, chosen)
    quantize_model(model, batches, **chosen)
    hf.save_model(model, out_dir, format, covered)
    report = model.awq_report
    if html is not None:
        report.to_html(html, overwrite)
    console.print(escape(report.summary()), soft_wrap=True)
    if scored:  # only now: should it fail, the model is there
        found = score(model, hf.load_model(model_dir, dtype, trust_remote_code), scored, str(out_dir), console)
        report.evaluations = {name: one.to_dict() for name, one in found.items()}
        record_scores(out_dir, report.evaluations)
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
