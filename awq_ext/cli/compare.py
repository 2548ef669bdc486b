"""``awq-ext compare``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..reporting.readers import DEFAULT_FORMAT
from .console import console_for, one_line_errors, say, set_threads, write_json
from .doctor import busy_words
from .options.checks import check_output
from .options.settings import parse_method, read_settings, with_builtin
from .options.types import (
    Bits,
    Calib,
    Device,
    Dtype,
    Field,
    FloatModel,
    GroupSize,
    Head,
    JsonPath,
    Overwrite,
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
)
from .options.words import in_options

if TYPE_CHECKING:
    from torch import Tensor, nn


@one_line_errors
def compare(
    model_dir: FloatModel,
    calib: Calib,
    traffic: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Evaluation text, not that of --calib. May be repeated.",
        ),
    ],
    method: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[,FIELD=VALUE...]",
            help="rtn, awq, gptq or awq+gptq, or an effort (fast, balanced, best), with settings of its own: "
            "'awq,clip=false,label=bare'. May be repeated.",
        ),
    ] = ["rtn", "awq"],  # noqa: B006
    group_size: GroupSize = None,
    head: Head = None,
    bits: Bits = None,
    field: Field = None,
    samples: Samples = 32,
    seed: Seed = 0,
    seq_len: SeqLen = 512,
    tokens: Tokens = 8192,
    settings: Settings = [],  # noqa: B006
    per_layer: PerLayer = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    markdown: Annotated[
        Path | None, typer.Option(callback=check_output, help="Also write the table as Markdown.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
) -> None:
    """Quantize a model in several ways and score each on the kinds of text you serve.

    For every evaluation text: perplexity, its distance from the float model's, the KL divergence and the share of tokens on which
    both agree, with bootstrap intervals. Methods that are not significantly different from the best are marked. The last lines
    say which method to take, and by which command. Nothing is written but the tables.

    Example: awq-ext compare ./Llama --calib prompts.jsonl --traffic code=src.txt --traffic de.txt --method rtn --method awq
    """
    from .. import compare as compare_methods
    from ..checkpoints.formats import LAYOUTS
    from ..evaluation.compare import read_methods
    from ..evaluation.verdict import verdict
    from . import hf, texts

    set_threads(threads)
    console = console_for(json_path)
    named = hf.named_texts(traffic)
    usual = LAYOUTS[DEFAULT_FORMAT].default_group_size
    fields = {"group_size": group_size or usual, "bits": bits, "seq_len": seq_len}
    chosen = with_builtin(calib, read_settings(fields, settings, per_layer=per_layer, head=head))
    # an effort would add the built-in texts where they are what is given
    given_alone = {"builtin_text": False} if chosen.get("builtin_text") is False else {}
    methods = [given_alone | parse_method(text) for text in method]
    try:
        read_methods(methods, chosen)  # before a model is loaded for nothing
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--method") from None
    texts.check_field(field, [*calib, *named.values()])
    folder = hf.folder(model_dir, revision, token)
    hf.refuse_quantized(folder)
    tokenizer = hf.load_tokenizer(folder, trust_remote_code)
    batches = texts.drawn_windows(calib, tokenizer, samples, seq_len, field, seed)
    scored = texts.windows_of(named, tokenizer, tokens, seq_len, field)
    model = hf.load_model(folder, dtype, trust_remote_code, device)
    if group_size is None and chosen["group_size"] == usual:
        chosen = hf.with_usual_groups(model, batches[0], chosen)
    hf.note_lengths(model, batches, samples)
    hf.note_same_texts(calib, named)
    found = compare_methods(model, batches, scored, methods, tokenizer=tokenizer, progress=True, **chosen)
    console.print(found)
    if busy := busy_words():
        console.print(f"other programs: {busy}", soft_wrap=True)
    if markdown is not None:
        markdown.write_text(found.to_markdown(), encoding="utf-8")
    summed = verdict(found)
    console.print(f"\n{summed.text}", markup=False, soft_wrap=True)
    given = {"field": field, "samples": samples, "seed": seed, "seq-len": seq_len, "dtype": dtype, "device": device}
    parts = _beginning(model_dir, calib, given)
    effort = next((one["effort"] for one in methods if one["label"] == summed.label and "effort" in one), None)
    config = found[summed.label].config
    implied = with_builtin(calib, {})
    if following := next_command(parts, config, effort, implied):
        following = next_command([*parts, *_format_for(model, batches[0], config)], config, effort, implied)
    none = "none, as only 4 or 8 bits, packed, can be saved: compare such methods"
    console.print(f"next: {following or none}", markup=False, soft_wrap=True)
    write_json(found.to_dict() | {"verdict": summed.text, "take": summed.label, "next": following}, json_path)


def _beginning(model: Path, calib: list[Path], given: Mapping[str, Any]) -> list[str]:
    """Begin a command with the options that were given here and are not the usual ones."""
    usual = {"field": None, "samples": 32, "seed": 0, "seq-len": 512, "dtype": "auto", "device": "cpu"}
    parts = ["quantize", str(model), f"{_last_name(model)}-quantized"]
    parts += [part for file in calib for part in ("--calib", str(file))]
    return parts + [part for name, x in given.items() if x != usual[name] for part in (f"--{name}", str(x))]


def _format_for(model: nn.Module, batch: Tensor, config: Mapping[str, Any]) -> list[str]:
    """Choose the format of a row's model: nothing where the usual one holds it, else, with a note, the one that holds all."""
    from ..checkpoints.formats import CheckpointError
    from . import hf

    try:
        hf.check_format(model, batch, DEFAULT_FORMAT, {**config, "fold": "always"})
    except CheckpointError as error:
        reason = str(error).splitlines()[1].partition(": ")[2]  # of the first layers that do not fit
        say(
            "[yellow]note:[/yellow] the next command writes the format native, which awq_ext alone loads. "
            f"{DEFAULT_FORMAT} cannot hold this model: {escape(in_options(reason))}"
        )
        return ["--format", "native"]
    return []


def _last_name(model: Path) -> str:
    """Take the last part of a path, or of ORG/NAME@REVISION."""
    return Path(str(model).partition("@")[0]).name or model.resolve().name


def next_command(
    parts: list[str], config: Mapping[str, Any], effort: str | None = None, implied: Mapping[str, Any] | None = None
) -> str:
    """Write the command that makes a directory with the settings of a row; "" where none does.

    parts: its beginning; effort: what the row was asked for by, if it was; implied: settings that the beginning brings.
    """
    from ..config import AwqConfig

    if not config["packed"] or config["bits"] not in (4, 8):
        return ""
    usual = (AwqConfig() if effort is None else AwqConfig(effort=effort)).to_dict() | dict(implied or {})
    parts = parts if effort is None else [*parts, "--effort", effort]
    said = {name: value for name, value in config.items() if value != usual[name] and name != "seq_len"}
    for name in ("method", "group_size", "bits"):
        if name in said:
            parts = [*parts, f"--{name.replace('_', '-')}", str(said.pop(name))]
    for name, value in said.items():
        parts = [*parts, "--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(["awq-ext", *parts])
