"""Build empty Transformers models from their directories, and carry the files that lie beside the weights."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoints.conversions import is_transformers_model, transformers
from ..checkpoints.formats import CheckpointError
from ..checkpoints.quantized_dir import CONFIG

GENERATION = "generation_config.json"
# what a tokenizer or processor consists of
_COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.tiktoken|chat_template.*"
    r"|(pre)?processor_config\.json|video_preprocessor_config\.json|spiece\.model|sentencepiece.*|.*\.spm"
)


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Write generation_config.json, and the tokenizer's and processor's files."""
    generation = getattr(model, "generation_config", None)
    if is_transformers_model(model) and generation is not None:
        (folder / GENERATION).write_text(generation.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        for each in tokenizer if isinstance(tokenizer, (list, tuple)) else [tokenizer]:
            each.save_pretrained(folder)
        return
    origin = _origin(model) if is_transformers_model(model) else None
    for file in origin.iterdir() if origin else ():
        if file.is_file() and _COMPANIONS.fullmatch(file.name):
            shutil.copy2(file, folder / file.name)


def _origin(model: nn.Module) -> Path | None:
    """Find the directory that a model was loaded from, in the Hugging Face cache if it came from the hub."""
    name = getattr(model.config, "_name_or_path", "")
    if not isinstance(name, str) or not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, CONFIG, revision=getattr(model.config, "_commit_hash", None))
    except HFValidationError:
        return None  # the path of a directory that is gone
    return Path(config).parent if isinstance(config, str) else None


class _EmptyOnMeta(TorchFunctionMode):
    """Make torch.empty, by which all large parameters come about, give meta tensors; what is computed (rotary tables) is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def empty_model(folder: Path, dtype: torch.dtype | None, options: Mapping[str, Any]) -> nn.Module:
    """Build the model that config.json describes, its large parameters on the meta device, its buffers computed."""
    package = transformers()
    options = {"trust_remote_code": False, **options}  # else transformers asks, where somebody could answer
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} has no {CONFIG}: build the model yourself and use awq_ext.load(model, directory)"
        )
    try:
        config = package.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that transformers knows: {error}") from None
    for holder in (config, getattr(config, "text_config", None)):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config  # the model in memory is ours
    if getattr(config, "_attn_implementation_autoset", False):
        config._attn_implementation_autoset = False  # transformers 4 saves that it chose, but not what
    names = getattr(config, "architectures", None) or []
    kind = next((found for name in names if (found := getattr(package, name, None)) is not None), None)
    wanted = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    with _default_dtype(wanted), _EmptyOnMeta(), torch.no_grad():
        if kind is not None:
            return kind(config)
        return package.AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])


def finish(model: nn.Module, folder: Path) -> None:
    """Do what transformers' own from_pretrained does after the weights: read the generation settings."""
    if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers().GenerationConfig.from_pretrained(folder)


def ignored(model: nn.Module) -> Callable[[str], bool]:
    """Tell by name which tensors of files the model's class does not need."""
    patterns = [r"rotary_emb\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)
