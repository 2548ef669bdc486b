"""Hugging Face directories and texts, as the commands read and write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import INDEX_NAME, CheckpointError
from ..checkpoint import read_report as checkpoint_report
from ..pretrained import from_pretrained, save_pretrained
from ..report import AwqReport

REPORT_NAME = "awq_report.json"
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_LONGEST_TOKEN = (
    24  # characters: so much of a text is enough for a number of tokens, without reading all of a large file
)


def transformers() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face directories need transformers: pip install 'awq-ext[hf]'") from error
    return transformers


def load_model(directory: Path, dtype: str = "auto") -> nn.Module:
    """The causal language model in a directory, in evaluation mode: float, or quantized in any layout."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_quantized(directory):
        return from_pretrained(directory, None if dtype == "auto" else chosen)
    auto = transformers().AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=chosen, local_files_only=True).eval()


def is_quantized(directory: Path) -> bool:
    """Whether a directory says of itself that its weights are quantized."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return (directory / INDEX_NAME).exists() or "quantization_config" in config


def load_tokenizer(directory: Path) -> Any:
    """Its tokenizer."""
    return transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)


def save_model(model: nn.Module, directory: Path, format: str) -> None:
    """Write the quantized model with its tokenizer, and its report beside it, which most layouts have no place for."""
    save_pretrained(model, directory, format)
    (directory / REPORT_NAME).write_text(json.dumps(model.awq_report.to_dict()), encoding="utf-8")


def read_report(directory: Path) -> AwqReport:
    """The report that :func:`save_model` or ``awq_ext.save`` left. ValueError where there is none."""
    path = directory / REPORT_NAME
    if path.exists():
        return AwqReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    try:
        return checkpoint_report(directory)
    except CheckpointError as error:
        raise ValueError(
            f"{directory} holds no report: {REPORT_NAME} is written by awq-ext quantize ({error})"
        ) from error


def read_text(path: Path, tokenizer: Any) -> str:
    """The text of a file; of a .jsonl file all "text" fields, or "messages" through the model's chat template."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return content
    documents = []
    for number, line in enumerate(filter(str.strip, content.splitlines()), 1):
        entry = json.loads(line)
        if "text" in entry:
            documents.append(entry["text"])
        elif "messages" in entry:
            documents.append(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
        else:
            raise ValueError(f'{path}, line {number} has neither "text" nor "messages": its keys are {sorted(entry)}')
    return "\n".join(documents)


def windows(paths: Sequence[Path], tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """Up to ``count`` windows int64 [1, length] of each text's beginning, as many of one text as of another."""
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


def named_texts(entries: Sequence[str]) -> dict[str, Path]:
    """``code=src.txt`` or ``src.txt`` -> name (the file's own by default) and path. ValueError for what is no file."""
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
