"""All that knows the transformers package: configs, empty models, tied and renamed weights, companion files."""

from __future__ import annotations

import json
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


def config_of(model: nn.Module) -> dict[str, Any]:
    """config.json without quantization_config; the model's own config stays as it is."""
    if not is_transformers_model(model):
        return {"architectures": [type(model).__name__]}
    config = json.loads(model.config.to_json_string())
    for key in (
        "quantization_config",
        "_attn_implementation_autoset",
    ):  # the latter: transformers 4 would skip its own choice
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the latter: before transformers 4.56
    _add_old_rope(config)
    return config


def _add_old_rope(config: dict[str, Any]) -> None:
    """What transformers 5 has as rope_parameters, under the names of transformers 4 too; its readers would take defaults."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """generation_config.json, and the tokenizer's and processor's files."""
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
    """The directory that a model was loaded from, in the Hugging Face cache if it came from the hub."""
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
    """torch.empty, with which every parameter of size is made, makes meta tensors; what is computed (rotary tables) is real."""

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
    """The model that config.json describes, its large parameters on the meta device, its buffers computed."""
    package = transformers()
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
        return package.AutoModelForCausalLM.from_config(
            config, trust_remote_code=options.get("trust_remote_code", False)
        )


def finish(model: nn.Module, folder: Path) -> None:
    """What transformers' own from_pretrained does after the weights: the generation settings."""
    if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers().GenerationConfig.from_pretrained(folder)


def dropped_ties(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers leaves a tensor of this name out of files if it is tied to another."""
    patterns = list(getattr(model, "_tied_weights_keys", None) or [])
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def ignored(model: nn.Module) -> Callable[[str], bool]:
    """Tensors of files that the model's class says it does not need."""
    patterns = [r"rotary_emb\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)
