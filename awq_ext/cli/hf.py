"""Read and write Hugging Face directories and texts for the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from ..checkpoints.conversions import transformers
from ..checkpoints.formats import CheckpointError
from ..checkpoints.quantized_dir import CONFIG
from ..checkpoints.shards import first_json
from ..checkpoints.version_1 import VERSION_1
from ..integrations import planned
from ..integrations.hub import folder_of
from ..integrations.pretrained import from_pretrained, save_pretrained
from ..reporting.readers import lines
from .options import say

_DTYPES = ("auto", "bfloat16", "float16", "float32")
# Characters: so much of a text is enough for a number of tokens, without reading all of a large file.
_LONGEST_TOKEN = 24
# of a batch: enough to see which layers a model calls
_FEW_TOKENS = 32


def folder(source: Path) -> Path:
    """Find the directory of a model: itself, or that of ORG/NAME or ORG/NAME@REVISION on the hub, downloaded if need be."""
    name, _, revision = (str(source), "", "") if source.is_dir() else str(source).partition("@")
    return folder_of(name, revision or None)


def load_model(directory: Path, dtype: str = "auto") -> nn.Module:
    """Load the causal language model of a directory, float or quantized in any layout, in evaluation mode."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    if not (directory / CONFIG).exists():
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_quantized(directory):
        return from_pretrained(directory, None if dtype == "auto" else chosen)
    if not sys.stderr.isatty():  # no bars in log files
        transformers().utils.logging.disable_progress_bar()
    auto = transformers().AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=chosen, local_files_only=True, trust_remote_code=False).eval()


def is_quantized(directory: Path) -> bool:
    """Tell whether a directory says of itself that its weights are quantized."""
    return (directory / VERSION_1).exists() or "quantization_config" in read_config(directory)


def read_config(directory: Path) -> Mapping[str, Any]:
    """Read config.json; empty where there is none. ValueError for one that is damaged."""
    return first_json(directory, CONFIG) or {}


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory. ValueError where there is none that can be loaded."""
    if not read_config(directory):
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    try:
        auto = transformers().AutoTokenizer
        return auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        files = sorted(file.name for file in directory.glob("*token*"))
        what = (
            f"its tokenizer ({', '.join(files)}) cannot be loaded" if files else "it has no tokenizer (tokenizer.json)"
        )
        raise ValueError(f"{directory}: {what}: {' '.join(str(error).split())}") from error


def save_model(model: nn.Module, directory: Path, format: str) -> None:
    """Write the quantized model with its tokenizer and its report."""
    save_pretrained(model, directory, format)


def check_format(model: nn.Module, batch: Tensor, format: str, settings: Mapping[str, Any]) -> None:
    """Say before the work, in CheckpointError, that a format cannot hold what would become of the model, with the ways out."""
    try:
        planned.check_format(model, batch[:, :_FEW_TOKENS], format, settings)
    except CheckpointError as error:
        text = str(error).replace("cannot hold this model; nothing was written", "could not hold the quantized model")
        ways = "settings are options here: --group-size, --skip, --set FIELD=VALUE. "
        ways += "--format native, which awq_ext alone loads, holds every model"
        raise CheckpointError(f"{text}\n{ways}") from None


def tell_readers(console: Console, directory: Path, format: str) -> None:
    """Print where a model was written, and who loads it with which command."""
    console.print(f"written to {escape(str(directory))} ({format}), which these load:", soft_wrap=True)
    for line in lines(format, str(directory)):
        console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)


def read_text(path: Path, tokenizer: Any) -> str:
    """Read the text of a file; of a .jsonl file all "text" fields, or "messages" through the model's chat template."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return content
    # not splitlines(), which also ends a line where JSON may hold a character such as U+2028
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return "\n".join(_document(line, f"{path}, line {number}", tokenizer) for number, line in lines)


def _document(line: str, place: str, tokenizer: Any) -> str:
    """Read the text of one line of a .jsonl file."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(entry, dict) or not {"text", "messages"} & entry.keys():
        keys = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f'{place} has neither "text" nor "messages": it has {keys}')
    if "text" in entry:
        if not isinstance(entry["text"], str):
            raise ValueError(f'{place}: "text" is a {type(entry["text"]).__name__}, not a string')
        return entry["text"]
    try:
        return tokenizer.apply_chat_template(entry["messages"], tokenize=False)
    except Exception as error:  # a template is a program of the model's
        raise ValueError(f"{place}: the tokenizer's chat template refuses its messages: {error}") from error


def windows(paths: Sequence[Path], tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """Cut up to ``count`` windows int64 [1, length] from the beginnings of texts, as many of one as of another."""
    each = -(-count // len(paths))
    found = []
    for path in paths:
        text = read_text(path, tokenizer)[: each * length * _LONGEST_TOKEN]
        # without truncation the tokenizer warns of more tokens than the model takes at once: here they are cut below
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        whole = ids[: len(ids) // length * length].view(-1, length)
        if len(whole) == 0:
            raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {length}: give more text")
        found += list(whole[:each].split(1))
    return found[:count]


def note_lengths(model: nn.Module, batches: Sequence[Tensor], wanted: int = 0) -> None:
    """Say on standard error what makes figures worth less: too little text, or windows longer than the model was made for."""
    if len(batches) < wanted:
        say(f"[yellow]note:[/yellow] the calibration text has {len(batches)} windows, {wanted} were asked for")
    config = getattr(model, "config", None)
    most = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if isinstance(most, int) and batches[0].shape[1] > most:
        say(
            f"[yellow]note:[/yellow] windows of {batches[0].shape[1]} tokens are longer than the {most} that the model was "
            "made for (max_position_embeddings): give a smaller --seq-len"
        )


def named_texts(entries: Sequence[str]) -> dict[str, Path]:
    """Read ``code=src.txt`` or ``src.txt`` as name (the file's own by default) and path. ValueError for what is no file."""
    found: dict[str, Path] = {}
    for entry in entries:
        name, equals, rest = entry.partition("=")
        path = Path(rest if equals else entry)
        name = name if equals else path.stem
        if not path.is_file():
            raise ValueError(f"{path} is no file: give texts as PATH or NAME=PATH")
        if name in found:
            raise ValueError(f"two texts are called {name!r}: name one, NAME={path}")
        found[name] = path
    return found
