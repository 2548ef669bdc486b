"""``awq-ext eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..reporting.tables import Cell, Table
from .console import console_for, one_line_errors, set_threads, write_json
from .options.checks import check_source
from .options.types import (
    Device,
    Dtype,
    Field,
    JsonPath,
    ModelDir,
    Overwrite,
    Revision,
    SeqLen,
    Threads,
    Token,
    Tokens,
    Trust,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .. import Evaluation


@one_line_errors
def eval(
    model_dir: ModelDir,
    files: Annotated[list[str], typer.Argument(metavar="[NAME=]PATH...", help="Texts to score on.")],
    reference: Annotated[
        Path | None,
        typer.Option(callback=check_source, help="The float model: also measure the distance from it."),
    ] = None,
    field: Field = None,
    seq_len: SeqLen = 512,
    tokens: Tokens = 8192,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    card: Annotated[
        bool,
        typer.Option("--card", help="Also write the figures into the model card and the report in MODEL, a directory."),
    ] = False,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
) -> None:
    """Score a model, float or quantized, on texts.

    Perplexity on the first tokens of each text, in windows without overlap; with --reference also the mean KL divergence from that
    model in nats a token, and the share of tokens for which both find the same next one most likely. 95 % intervals over windows.
    A second table then has the figures of llama.cpp's --kl-divergence: median, tail and largest divergence of single tokens, both
    perplexities, and how far the probability of the text's own next token moved (RMS Δp).

    Example: awq-ext eval ./Llama-int4 --reference ./Llama code.txt prose.txt
    """
    from ..checkpoints.saved import record_scores
    from ..checkpoints.write import is_quantized
    from . import hf, texts

    set_threads(threads)
    console = console_for(json_path)
    named = hf.named_texts(files)
    texts.check_field(field, named.values())
    if card and not (model_dir.is_dir() and is_quantized(model_dir)):
        raise typer.BadParameter(f"{model_dir} is no directory of a quantized model", param_hint="--card")
    folder = hf.folder(model_dir, revision, token)
    tokenizer = hf.load_tokenizer(folder, trust_remote_code)
    model = hf.load_model(folder, dtype, trust_remote_code, device)
    other = None
    if reference is not None:
        other = hf.load_model(hf.folder(reference, token=token), dtype, trust_remote_code, device)
    if other is not None and len(set(sizes := [_vocabulary(model), _vocabulary(other)]) - {None}) > 1:
        raise ValueError(
            f"{model_dir} has {sizes[0]} tokens, {reference} {sizes[1]}: a reference has the same tokenizer"
        )
    scored = texts.windows_of(named, tokenizer, tokens, seq_len, field)
    hf.note_lengths(model, next(iter(scored.values())))
    found = score(model, other, scored, str(model_dir), console)
    figures = {name: one.to_dict() for name, one in found.items()}
    if card:
        record_scores(folder, figures)
        console.print(f"written to the model card and the report in {escape(str(folder))}", soft_wrap=True)
    write_json(figures, json_path)


def score(
    model: nn.Module, reference: nn.Module | None, scored: Mapping[str, Sequence[Tensor]], title: str, console: Console
) -> dict[str, Evaluation]:
    """Score a model on windows of tokens by the name of their text, and print the figures as a table."""
    from .. import evaluate

    found = {name: evaluate(model, samples, reference=reference, progress=True) for name, samples in scored.items()}
    figures = [_figures(one) for one in found.values()]
    rows = [
        [Cell(name), Cell(f"{one.tokens:,}"), *map(Cell, values.values())]
        for (name, one), values in zip(found.items(), figures, strict=True)
    ]
    console.print(Table(title, ["text", "tokens", *figures[0]], rows).to_rich())
    windows = ", ".join(f"{one.windows} of {escape(name)}" for name, one in found.items())
    legend = f"±: half the 95% interval over windows ({windows}); of fewer than ten windows it says little"
    if reference is not None:
        legend += "\nkl: distance from the reference in nats a token, 0 is none; top1: share of tokens with the same likeliest next"
    console.print(legend, highlight=False)
    if (table := _llama_table(found)) is not None:
        console.print(table.to_rich())
    return found


def _figures(found: Evaluation) -> dict[str, str]:
    """Format the measures, with the reference's perplexity beside the model's."""
    from ..evaluation.comparison import plus_minus

    measures = {name: plus_minus(found[name]) for name in found.measures}
    if (other := found.reference_perplexity) is not None:
        # without its interval, as in the tables of compare: rows fit into 80 columns
        measures = {"perplexity": measures["perplexity"], "the reference's": f"{other.value:.3f}", **measures}
    return measures


def _llama_table(found: Mapping[str, Evaluation]) -> Table | None:
    """Put the distance on each text in a column, under llama.cpp's names; None without a reference."""
    lines = {name: dict(one.distance.lines()) for name, one in found.items() if one.distance is not None}
    if not lines:
        return None
    names = next(iter(lines.values()))
    rows = [[Cell(name), *(Cell(one[name]) for one in lines.values())] for name in names]
    return Table("the same in the form of llama.cpp", ["", *lines], rows)


def _vocabulary(model: nn.Module) -> int | None:
    """Count the tokens that a model can read; None where it does not tell, as classes of their own may not."""
    from ..modules import input_embeddings

    return getattr(input_embeddings(model), "num_embeddings", None)
