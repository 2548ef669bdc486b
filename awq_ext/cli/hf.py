"""Hugging Face directories and texts, as the commands read and write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import INDEX_NAME, load, save

_DTYPES = ("auto", "bfloat16", "float16", "float32")
# what belongs to a model beside its weights
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
)
_MORE_COMPANIONS = ("chat_template*", "*.model", "preprocessor_config.json", "processor_config.json")
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
    """The causal language model in a directory, in evaluation mode: a float one, or one that ``awq-ext quantize`` wrote."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    auto = transformers().AutoModelForCausalLM
    if not (directory / INDEX_NAME).exists():
        chosen = dtype if dtype == "auto" else getattr(torch, dtype)
        return auto.from_pretrained(directory, dtype=chosen, local_files_only=True).eval()
    config = transformers().AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = auto.from_config(config)
    return load(model, directory).eval()


def load_tokenizer(directory: Path) -> Any:
    """Its tokenizer."""
    return transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)


def save_model(model: nn.Module, source: Path, directory: Path) -> None:
    """Write the quantized model in the native format, with the files beside the weights of ``source``."""
    save(model, directory)
    for pattern in (*_COMPANIONS, *_MORE_COMPANIONS):
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)


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
