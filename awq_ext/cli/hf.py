"""Read and write Hugging Face directories and texts for the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.conversions import transformers
from ..checkpoints.quantized_dir import CONFIG
from ..checkpoints.shards import first_json
from ..checkpoints.version_1 import VERSION_1
from ..checkpoints.write import REPORT, Overwrite
from ..integrations.pretrained import from_pretrained, save_pretrained
from .options import DTYPES, say


def load_model(directory: Path, dtype: str = "auto") -> nn.Module:
    """Load the causal language model of a directory, float or quantized in any layout, in evaluation mode."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if not (directory / CONFIG).exists():
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_quantized(directory):
        return from_pretrained(directory, None if dtype == "auto" else chosen)
    if not sys.stderr.isatty():  # no bars in log files
        transformers().utils.logging.disable_progress_bar()
    auto = transformers().AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=chosen, local_files_only=True).eval()


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
        return transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError, TypeError, KeyError) as error:
        files = sorted(file.name for file in directory.glob("*token*"))
        what = (
            f"its tokenizer ({', '.join(files)}) cannot be loaded" if files else "it has no tokenizer (tokenizer.json)"
        )
        raise ValueError(f"{directory}: {what}: {' '.join(str(error).split())}") from error


def save_model(model: nn.Module, directory: Path, format: str, overwrite: Overwrite = False) -> None:
    """Write the quantized model with its tokenizer, and its report beside it, which most layouts have no place for."""
    save_pretrained(model, directory, format, overwrite=overwrite)
    (directory / REPORT).write_text(json.dumps(model.awq_report.to_dict()), encoding="utf-8")


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
