"""``awq-ext compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Calib,
    Dtype,
    Field,
    Head,
    JsonPath,
    ModelDir,
    Overwrite,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Settings,
    Threads,
    Token,
    Tokens,
    Trust,
    check_group_size,
    check_output,
    console_for,
    one_line_errors,
    parse_method,
    read_settings,
    set_threads,
    write_json,
)


@one_line_errors
def compare(
    model_dir: ModelDir,
    calib: Calib,
    traffic: Annotated[
        list[str], typer.Option(metavar="[NAME=]PATH", help="Text to score on, not that of --calib. May be repeated.")
    ],
    method: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[,FIELD=VALUE...]",
            help="rtn, awq, gptq or awq+gptq, with settings of its own: 'awq,clip=false,label=bare'. May be repeated.",
        ),
    ] = ["rtn", "awq"],  # noqa: B006
    group_size: Annotated[
        int, typer.Option(callback=check_group_size, help="Weights that share a scale; -1 is one scale for each row.")
    ] = 128,
    head: Head = None,
    field: Field = None,
    samples: Samples = 32,
    seed: Seed = 0,
    seq_len: SeqLen = 512,
    tokens: Tokens = 8192,
    settings: Settings = [],  # noqa: B006
    dtype: Dtype = "auto",
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

    For every kind of traffic: perplexity, its distance from the float model's, the KL divergence and the share of tokens on
    which both agree, with bootstrap intervals; what cannot be told apart from the best is marked. Nothing is written but the
    tables.

    Example: awq-ext compare ./Llama --calib prompts.jsonl --traffic code=src.txt --traffic de.txt --method rtn --method awq
    """
    from .. import compare as compare_methods
    from ..evaluation.compare import read_methods
    from . import hf, texts

    set_threads(threads)
    console = console_for(json_path)
    named = hf.named_texts(traffic)
    chosen = read_settings({"group_size": group_size, "seq_len": seq_len}, settings, head=head)
    methods = [parse_method(text) for text in method]
    try:
        read_methods(methods, chosen)  # before a model is loaded for nothing
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--method") from None
    texts.check_field(field, [*calib, *named.values()])
    model_dir = hf.folder(model_dir, revision, token)
    tokenizer = hf.load_tokenizer(model_dir, trust_remote_code)
    batches = texts.drawn_windows(calib, tokenizer, samples, seq_len, field, seed)
    scored = texts.windows_of(named, tokenizer, tokens, seq_len, field)
    model = hf.load_model(model_dir, dtype, trust_remote_code)
    hf.note_lengths(model, batches, samples)
    found = compare_methods(model, batches, scored, methods, progress=console.is_terminal, **chosen)
    console.print(found)
    if markdown is not None:
        markdown.write_text(found.to_markdown(), encoding="utf-8")
    write_json(found.to_dict(), json_path)
