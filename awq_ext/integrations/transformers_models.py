"""Build empty Transformers models from their directories, and carry the files that lie beside the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoints.conversions import is_transformers_model, transformers
from ..checkpoints.convert import carry
from ..checkpoints.formats import CheckpointError
from ..checkpoints.gguf.single import complete
from ..checkpoints.model_source import origin
from ..checkpoints.quantized_dir import CONFIG, QUANTIZATION
from ..checkpoints.write import is_quantized
from ..reporting.model_card import CARD

GENERATION = "generation_config.json"
# what a tokenizer or processor consists of
_COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.tiktoken|chat_template.*"
    r"|(pre)?processor_config\.json|video_preprocessor_config\.json|spiece\.model|sentencepiece.*|.*\.spm"
)


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Write generation_config.json, the tokenizer's files, and what else lies beside the weights where the model came from."""
    if (source := origin(model)) is not None and (source / CONFIG).is_file():
        if tokenizer is None:
            complete(source)
        # a float model's card tells of another model than this one: see write_beside
        left = {CARD} if not is_quantized(source) else set()
        carry(
            source,
            folder,
            lambda name: name in left or (tokenizer is not None and _COMPANIONS.fullmatch(name) is not None),
        )
    generation = getattr(model, "generation_config", None)
    if is_transformers_model(model) and generation is not None:
        (folder / GENERATION).write_text(generation.to_json_string(), encoding="utf-8")
    for each in tokenizer if isinstance(tokenizer, (list, tuple)) else [tokenizer]:
        if each is not None:
            each.save_pretrained(folder)


def with_local_code(config: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """Let auto_map name code that is carried along as a file beside it: of hub models it names the repository."""
    mapped = config.get("auto_map")
    if source is None or not isinstance(mapped, dict):
        return config

    def local(name: Any) -> Any:
        if isinstance(name, list):
            return [local(each) for each in name]
        rest = name.rpartition("--")[2] if isinstance(name, str) else ""
        return rest if rest and (source / f"{rest.partition('.')[0]}.py").is_file() else name

    return config | {"auto_map": {kind: local(name) for kind, name in mapped.items()}}


class EmptyOnMeta(TorchFunctionMode):
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
    _drop_settings(config)  # the model in memory is ours
    if getattr(config, "_attn_implementation_autoset", False):
        config._attn_implementation_autoset = False  # transformers 4 saves that it chose, but not what
    names = getattr(config, "architectures", None) or []
    kind = next((found for name in names if (found := getattr(package, name, None)) is not None), None)
    auto = _own_code(config) if options["trust_remote_code"] else None
    wanted = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    with _default_dtype(wanted), EmptyOnMeta(), torch.no_grad():
        if kind is not None and auto is None:
            return kind(config)
        return getattr(package, auto or "AutoModelForCausalLM").from_config(
            config, trust_remote_code=options["trust_remote_code"]
        )


def _own_code(config: Any) -> str | None:
    """Name the AutoModel class by which code beside the weights has the model that config.json names; None without such code."""
    classes = {name: code for name, code in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in name}
    named = [name for name, code in classes.items() if str(code).rpartition(".")[2] in (config.architectures or [])]
    return next(iter([*named, *(name for name in ("AutoModelForCausalLM",) if name in classes), *classes]), None)


def _drop_settings(config: Any) -> None:
    """Remove quantization settings from a config and the configs of its parts, objects and dictionaries."""
    values = config if isinstance(config, dict) else vars(config)
    for key in QUANTIZATION:
        values.pop(key, None)
    for value in list(values.values()):
        if isinstance(value, dict) or hasattr(value, "to_json_string"):
            _drop_settings(value)


def finish(model: nn.Module, folder: Path) -> None:
    """Do what transformers' own from_pretrained does after the weights: read the generation settings."""
    if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers().GenerationConfig.from_pretrained(folder)


def ignored(model: nn.Module) -> Callable[[str], bool]:
    """Tell by name which tensors of files nobody misses: what the class says so of, in modules that it builds.

    Whole parts that it does not build (blocks that predict more tokens) are worth a word, whatever it says of them.
    """
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def passed_over(name: str) -> bool:
        if re.search(r"rotary_emb\.inv_freq$", name):
            return True
        return name.rpartition(".")[0] in modules and any(re.search(pattern, name) for pattern in patterns)

    return passed_over
