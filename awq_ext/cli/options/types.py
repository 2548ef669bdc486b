"""Types of the options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import (
    check_calib,
    check_device,
    check_dtype,
    check_effort,
    check_group_size,
    check_head,
    check_output,
    check_source,
)

ModelDir = Annotated[
    Path,
    typer.Argument(
        callback=check_source,
        metavar="MODEL",
        help="A Hugging Face directory, a quantized .gguf file, or ORG/NAME or ORG/NAME@REVISION on the hub (downloaded once, to "
        "the hub's cache).",
    ),
]
FloatModel = Annotated[
    Path,
    typer.Argument(
        callback=check_source,
        metavar="MODEL",
        help="The float model: a Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION on the hub (downloaded once, to the "
        "hub's cache).",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub; the same as ORG/NAME@REVISION.")
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Access token of the hub, for gated and private models. Others can read it in the list of processes: HF_TOKEN in the "
        "environment, or `hf auth login`, keep it from them.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. It can do whatever you can, so read it first.",
    ),
]
Calib = Annotated[
    list[Path],
    typer.Option(
        callback=check_calib,
        help="Text to calibrate on: .txt, or .jsonl, .json, .csv or .parquet with 'text', 'messages', 'conversations' or "
        "'prompt' and 'completion'. May be repeated. builtin: a small mix of languages and code that ships with the package.",
    ),
]
Field = Annotated[
    str | None,
    typer.Option(help="The column or field with the text or the messages, in .jsonl, .json, .csv and .parquet files."),
]
Seed = Annotated[int, typer.Option(help="Seed of the random choice of windows.")]
Head = Annotated[
    str | None,
    typer.Option(
        callback=check_head,
        help="The output layer: float (the default), int8 or int4. If it is tied to the embedding, it gets a weight of its own.",
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        callback=check_effort,
        help="A preset, by the time that it takes. fast: awq+gptq on 8,192 tokens. balanced: on 16,384, importance-weighted. best: "
        "on all tokens, importance-weighted; then the codes of each block are learned together. All three add the texts that ship "
        "with the package; in fast and balanced these fill half of the limit, or more if --calib is short. Other options and --set "
        "override what a preset says; --set max_calib_tokens=0 lifts the limit.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of calibration text, drawn evenly over all of it.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens to score of each text; more make the intervals narrower.")]
Dtype = Annotated[
    str,
    typer.Option(callback=check_dtype, help="Compute in this dtype: auto (as stored), bfloat16, float16 or float32."),
]
Bits = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=8,
        help="Bits of a weight: 4 (the default) or 8; 2, 3, 5, 6 and 7 only in compare, with --set packed=false.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(callback=check_device, help="Where to compute: cpu, cuda, cuda:1 or another device of torch's.")
]
PerLayer = Annotated[
    list[str],
    typer.Option(
        "--per-layer",
        metavar="PATTERN:FIELD=VALUE[,FIELD=VALUE...]",
        help="Other bits, group_size or method for some layers: '*.down_proj:bits=8,group_size=64', or JSON: "
        '\'{"*.down_proj": {"bits": 8}}\'. May be repeated; the first pattern that fits counts.',
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any other field of AwqConfig (its docstring explains them), such as clip=false, symmetric=true, damping=0.5, "
        "propagate=quantized, only='[\"*.mlp.*\"]'; AutoAWQ's w_bit, q_group_size and zero_point are "
        "understood too. May be repeated.",
    ),
]
OverwriteFloat = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Repeat OUT here to let it replace float weights. Those of the source are never replaced.",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        callback=check_group_size,
        help="Weights that share a scale; -1 is one scale for each row. 128 if not given (32 for the format gguf); smaller where "
        "that does not divide the model's widths.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", is_eager=True, help="Replace files that exist already, such as that of --json.")
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read all that was written back before the directory is put in place, and compare it bit by bit.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads, instead of torch's choice.")]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=check_output, metavar="PATH", help="Also write the figures here; - is standard output."
    ),
]
