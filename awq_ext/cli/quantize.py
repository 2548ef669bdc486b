"""``awq-ext quantize``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..distributed.launch import TIMEOUT, one_of_several
from ..reporting.readers import DEFAULT_FORMAT
from ..reporting.tables import format_bytes, shared_scales
from .console import command_line, console_for, one_line_errors, say, set_threads, write_json
from .options.checks import (
    check_directory,
    check_format,
    check_method,
    check_page,
    check_report_extra,
    check_size,
)
from .options.settings import made_symmetric, read_settings, refuse_effort_of_rtn, refuse_other_bits, with_builtin
from .options.types import (
    Bits,
    Calib,
    Device,
    Dtype,
    Effort,
    Field,
    FloatModel,
    GroupSize,
    Head,
    JsonPath,
    OverwriteFloat,
    PerLayer,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Settings,
    Threads,
    Token,
    Tokens,
    Trust,
    Verify,
)

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation.evaluate import Evaluation
    from ..evaluation.held_out import Remembered


@one_line_errors
@one_of_several
def quantize(
    context: typer.Context,
    model_dir: FloatModel,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Where the quantized model goes; made if need be.")],
    calib: Calib,
    method: Annotated[
        str | None,
        typer.Option(
            callback=check_method,
            help="awq (searched scales; the default), gptq (error feedback), awq+gptq, or rtn (rounding to nearest).",
            show_default=False,
        ),
    ] = None,
    effort: Effort = None,
    group_size: GroupSize = None,
    bits: Bits = None,
    format: Annotated[
        str,
        typer.Option(
            callback=check_format,
            help="Layout of OUT: awq and compressed-tensors are loaded by vLLM and Transformers, native by awq_ext, gguf by "
            "llama.cpp, mlx by mlx-lm; others in docs/formats.md, for layers of 8 bits in vLLM too.",
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
            help="Layers to leave float, such as '*.router' or 're:.*[.][01][.]mlp.*'. The output layer stays float anyway, unless "
            "--head is given. May be repeated.",
        ),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    per_layer: PerLayer = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    traffic: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Text to score OUT on, not that of --calib. The float model is loaded once more for it, and the distance from it "
            "goes into the model card. May be repeated.",
        ),
    ] = [],  # noqa: B006
    tokens: Tokens = 8192,
    html: Annotated[
        Path | None, typer.Option("--report", callback=check_page, help="Also write the report as a page (.html).")
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
    max_memory: Annotated[
        str | None,
        typer.Option(
            callback=check_size,
            metavar="SIZE",
            help="A model whose float weights take more than this, such as 12GB, is read from its files, block by block, and the "
            "work keeps within it (CPU only). By default 80 % of what is free.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, instead of going on where an interrupted command stopped.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="With several processes: after so long a silence a process counts as dead, and all others stop.",
        ),
    ] = TIMEOUT,
    verify: Verify = True,
    json_path: JsonPath = None,
) -> None:
    """Quantize a Hugging Face model to int4.

    The calibration text decides which channels are protected. Take a few dozen windows of text like the text you serve: prompts
    with their answers, in the model's chat format, not only prose. [bold]awq-ext compare[/bold] shows which method suits it best.

    The last lines say what quantizing cost: bytes, and the distance from the float model on calibration text that was left out.
    With --traffic the result is scored on evaluation texts of yours too. The model card has these figures.

    Example: awq-ext quantize ./Llama ./Llama-int4 --calib prompts.jsonl --calib code.txt --group-size 64

    After an interrupt of any kind the same command goes on after the last finished block. OUT.partial holds these blocks until OUT
    is complete.

    Several processes share the work: torchrun --nproc-per-node 4 -m awq_ext quantize ... (docs/scale.md).

    OUT holds config, tokenizer, weights, the report and a model card. Most formats cannot store scales that are applied at run
    time. For these, scales are folded into earlier layers or left out (fold=always). If the format cannot hold something else, such
    as widths that no group size tried divides, an error says so before the work begins.
    """
    from ..checkpoints.formats import LAYOUTS
    from ..checkpoints.saved import record_scores
    from ..evaluation.held_out import WINDOWS
    from ..streaming.limits import memory_limit
    from ..streaming.working import working
    from . import hf, texts
    from .eval import score

    covered = check_directory(out_dir, overwrite, overwrite_float, model_dir)
    if html is not None:
        check_report_extra()
    fold = "auto" if LAYOUTS[format].run_time_scales else "always"
    refuse_other_bits(settings, bits)
    fields = {
        "effort": effort,
        "method": method,
        "group_size": LAYOUTS[format].default_group_size if group_size is None else group_size,
        "bits": bits,
        "fold": fold,
        "seq_len": seq_len,
    }
    chosen = with_builtin(calib, read_settings(fields, settings, skip, per_layer, head))
    refuse_effort_of_rtn(chosen)
    if made_symmetric(chosen, LAYOUTS[format].symmetric_bits):
        say(
            f"[yellow]note:[/yellow] symmetric, as readers of {format} take no zero points of such layers (--set symmetric=false)"
        )
    set_threads(threads)
    console = console_for(json_path)
    named = hf.named_texts(traffic)
    texts.check_field(field, [*calib, *named.values()])
    source = hf.folder(model_dir, revision, token)
    hf.refuse_quantized(source)
    tokenizer = hf.load_tokenizer(source, trust_remote_code)
    batches, left = texts.drawn_and_left(calib, tokenizer, samples, seq_len, field, seed, WINDOWS)
    scored = texts.windows_of(named, tokenizer, tokens, seq_len, field)
    load = lambda: hf.load_model(source, dtype, trust_remote_code, device)  # noqa: E731
    builtin_alone = all(map(texts.is_builtin, calib))
    limit = memory_limit(max_memory) if device == "cpu" else None
    with (
        hf.told_to_go_on(out_dir),
        working(source, out_dir, load, limit, hf.chosen_dtype(dtype), trust_remote_code, fresh, timeout) as at,
    ):
        model = at.model
        hf.note_lengths(model, batches, 0 if builtin_alone else samples)
        hf.note_same_texts(calib, named)
        if group_size is None and chosen["group_size"] == LAYOUTS[format].default_group_size:
            chosen = hf.with_groups_that_fit(model, batches[0], format, chosen)
        else:
            hf.check_format(model, batches[0], format, chosen)
        remembered = _remembered(model, left, builtin_alone) if at.leads else None
        at.quantize(batches, chosen, tokenizer)
        report = model.awq_report
        report.command = command_line(context)
        if builtin_alone:
            report.builtin_tokens = report.calibration_tokens
        if at.leads:
            hf.save_model(model, out_dir, format, covered, at.streamed, verify)
        at.work.remove()
    if not at.leads:  # the first of several processes does the rest
        return
    console.print(_method_line(report.config, effort), soft_wrap=True, markup=False, highlight=False)
    console.print(escape(report.summary()), soft_wrap=True)
    for note in report.notes:
        say(f"[yellow]note:[/yellow] {escape(note)}")
    sizes = {"before": report.bytes_before, "after": report.bytes_after}
    console.print(_size_line(sizes), highlight=False)
    found, bad = _distance(model, remembered, console)  # only now: should it fail, the model is there
    if scored:
        found |= score(model, load(), scored, str(out_dir), console)
    report.evaluations = {name: one.to_dict() for name, one in found.items()}
    if found:
        record_scores(out_dir, report.evaluations)
    if html is not None:
        report.to_html(html, overwrite)
    hf.tell_readers(console, out_dir, format)
    following = _next(model_dir, out_dir, bool(scored), calib if bad else [])
    console.print(f"next: {following}", soft_wrap=True, markup=False)
    figures = {"out": str(out_dir), "format": format, "bytes": sizes, "next": following}
    write_json(figures | {"report": report.to_dict()}, json_path)


def _method_line(config: dict[str, Any], effort: str | None) -> str:
    asked = "" if effort is None else f" (effort {effort})"
    others = "; other settings for some layers" if config["per_layer"] else ""
    return f"method: {config['method']}{asked}, {config['bits']} bits, {shared_scales(config['group_size'])}{others}"


def _size_line(sizes: dict[str, int]) -> str:
    before, after = sizes["before"], sizes["after"]
    return f"size: {format_bytes(before)} before, {format_bytes(after)} after ({after / before:.0%})"


def _remembered(model: nn.Module, left: list[Any], builtin: bool) -> Remembered | None:
    """Keep what the float model answers on text that calibration does not see; None, and a note, without such text."""
    from ..evaluation.held_out import remember

    if left:
        try:
            return remember(model, left)
        except ValueError as error:  # of a class of its own, which may return anything
            say(f"[yellow]note:[/yellow] {escape(str(error))}")
            return None
    ways = (
        "give text of yours with --traffic"
        if builtin
        else "give more text, fewer --samples, or other text with --traffic"
    )
    say(
        "[yellow]note:[/yellow] all of the text went into calibration windows, so none is left to measure the distance from the "
        f"float model: {ways}"
    )
    return None


def _distance(model: nn.Module, before: Remembered | None, console: Console) -> tuple[dict[str, Evaluation], str]:
    """Measure and tell the distance from the float model; also returns what is wrong with it, or ""."""
    from ..evaluation import held_out

    if before is None:
        return {}, ""
    found = held_out.distance(model, before)
    console.print(held_out.told(found), soft_wrap=True, markup=False)
    if bad := held_out.doubt(found):
        say(f"[red]warning:[/red] {escape(bad)}")
    return {held_out.HELD_OUT: found}, bad


def _next(source: Path, out: Path, scored: bool, bad_calib: list[Path]) -> str:
    """Write the command to run next: compare methods where the result is bad, else score it, or read what was done."""
    if bad_calib:
        calib = [part for file in bad_calib for part in ("--calib", str(file))]
        methods = ["--method", "awq", "--method", "awq+gptq"]
        return shlex.join(["awq-ext", "compare", str(source), *calib, "--traffic", "TEXT.txt", *methods])
    if scored:
        return shlex.join(["awq-ext", "report", str(out), "report.html"])
    return shlex.join(["awq-ext", "eval", str(out), "TEXT.txt", "--reference", str(source), "--card"])
