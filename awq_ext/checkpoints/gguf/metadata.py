"""Make config.json of what a GGUF file says of its model: the reverse of ``Architecture.describe``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..formats import CheckpointError
from .architecture import gguf, key_of, windows
from .architectures import ENTRIES
from .entry import Entry
from .rope import rope_in

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def config_in(file: Path, reader: Any) -> dict[str, Any]:
    """Make the config of the model in ``file``, opened by ``reader`` (gguf.GGUFReader).

    dtype is that of the float matrices (embedding, head, layers), float32 where there are none.
    CheckpointError that names what is missing or not known.
    """
    said = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name = said.get("general.architecture")
    entry = _entry(file, said)
    if said.get("split.count", 1) != 1:
        raise CheckpointError(f"{file} is one of {said['split.count']} parts: join them with llama-gguf-split --merge")
    facts = Facts(file, name, said)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file} has no token_embd.weight: it holds no language model")
    config = _sizes(facts, entry) | _settings(facts, entry)
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["dtype"] = _dtype(tensors)
    config["rope_parameters"] = rope = rope_in(facts, entry, config["head_dim"], tensors)
    if rope.get("rope_type") == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    table = gguf().get_tensor_name_map(gguf().MODEL_ARCH[entry.key], 1)
    for setting, leaf in entry.biases.items():
        module, dot, tensor = leaf.partition(".weight")
        there = table.get_name(f"{entry.blocks}.0.{module}")
        config[setting] = f"{there}{dot or '.bias'}{tensor}" in tensors
    config = {need.name: need.of(config) for need in entry.needs} | config
    _name_as_there(file, entry, config)
    for token, there in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{token}_token_id"] = said.get(f"tokenizer.ggml.{there}_token_id")
    return config | {"quantization_config": {"quant_method": "gguf"}}


def _entry(file: Path, said: Mapping[str, Any]) -> Entry:
    """Find the entry by which a file is read; of several of one architecture that with experts or windows as the file has."""
    name = said.get("general.architecture")
    names = {entry: gguf().MODEL_ARCH_NAMES[gguf().MODEL_ARCH[entry.key]] for entry in ENTRIES}
    keys = (
        "expert_count",
        "attention.sliding_window",
        "expert_shared_feed_forward_length",
        "leading_dense_block_count",
    )
    has = [bool(said.get(f"{name}.{key}")) for key in keys]
    fits = {
        entry: (
            any("*" in module for module in entry.modules) == has[0],
            isinstance(entry.window, int) == has[1],
            any(value.key == "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH" for value in entry.values) == has[2],
            any(value.key == "LLM.LEADING_DENSE_BLOCK_COUNT" for value in entry.values) == has[3],
        )
        for entry, other in names.items()
        if other == name
    }
    if not fits:
        known = ", ".join(dict.fromkeys(names.values()))
        raise CheckpointError(f"{file}: general.architecture={name!r} is not known here; {known} are")
    return max(fits, key=fits.__getitem__)  # the first of those that fit best


def _sizes(facts: Facts, entry: Entry) -> dict[str, Any]:
    heads, width = facts.number("Attention.HEAD_COUNT"), facts.number("LLM.EMBEDDING_LENGTH")
    head = facts.number("Attention.KEY_LENGTH", width // heads)
    facts.require("Attention.VALUE_LENGTH", head)
    keys = facts.get("Attention.HEAD_COUNT_KV", heads)
    if entry.some_attention and isinstance(keys, list):
        kinds = {"layer_types": ["full_attention" if count else "conv" for count in keys]}
        keys = max(keys)
    else:
        kinds, keys = {}, facts.number("Attention.HEAD_COUNT_KV", heads)
    return kinds | {
        "architectures": [entry.classes[0]],
        "model_type": entry.model_type,
        "hidden_size": width,
        "num_hidden_layers": facts.number("LLM.BLOCK_COUNT"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head,
        "intermediate_size": facts.number("LLM.FEED_FORWARD_LENGTH"),
        "max_position_embeddings": facts.number("LLM.CONTEXT_LENGTH"),
    }


def _name_as_there(file: Path, entry: Entry, config: dict[str, Any]) -> None:
    """Give sizes the names they have in config.json; CheckpointError for those that do not follow from others as they should."""
    for name, how in entry.names.items():
        if isinstance(how, str) and name in config:
            config[how] = config[name]
        elif callable(how) and name in config and config[name] != how(config):
            raise CheckpointError(f"{file}: {name}={config[name]} is not known here, where it is {how(config)}")
    if "head_dim" in entry.names:  # which some configs have no place for
        del config["head_dim"]


def _settings(facts: Facts, entry: Entry) -> dict[str, Any]:
    """Read what is special about an architecture: its values, and the order of its layers."""
    found: dict[str, Any] = {}
    for value in entry.values:
        if value.optional and facts.get(value.key) is None:
            found[value.names[0]] = None
        elif value.kind is bool:
            found[value.names[0]] = bool(facts.get(value.key, value.absent))
        elif value.kind is int:
            found[value.names[0]] = facts.number(value.key)
        else:
            found[value.names[0]] = facts.real(value.key)
    for key, value in entry.always.items():
        if not callable(value):
            facts.require(key, float(np.float32(value)) if isinstance(value, float) else value)
    if isinstance(entry.window, int):
        found["sliding_window"] = facts.number("Attention.SLIDING_WINDOW")
        blocks = {"num_hidden_layers": facts.number("LLM.BLOCK_COUNT")}
        found["layer_types"] = windows(blocks, entry.window)
        order = [kind == "sliding_attention" for kind in found["layer_types"]]
        given = facts.get("Attention.SLIDING_WINDOW_PATTERN", order)
        if given not in (order, entry.window):
            raise facts.unknown("Attention.SLIDING_WINDOW_PATTERN", given)
    return found


def _dtype(tensors: Mapping[str, Any]) -> str:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    matrices.sort(key=lambda tensor: tensor.name not in ("token_embd.weight", "output.weight"))
    return next((_FLOATS[name] for tensor in matrices if (name := tensor.tensor_type.name) in _FLOATS), "float32")


class Facts:
    """The entries of one architecture, by their paths in gguf.Keys."""

    def __init__(self, file: Path, name: str, said: Mapping[str, Any]) -> None:
        self.file, self._name, self._said = file, name, said

    def get(self, path: str, default: Any = None) -> Any:
        """Read an entry; ``default`` where there is none."""
        return self._said.get(key_of(path, self._name), default)

    def _entry(self, path: str, default: Any) -> Any:
        value = self.get(path, default)
        if value is None:
            raise CheckpointError(
                f"{self.file} lacks {key_of(path, self._name)}, without which there is no config: put its config.json beside it, "
                "in a directory that holds it as model.gguf"
            )
        return value

    def number(self, path: str, default: int | None = None) -> int:
        """Read a whole number above 0."""
        value = self._entry(path, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.file}: {key_of(path, self._name)}={value!r}: one positive number is needed")
        return value

    def real(self, path: str, default: float | None = None) -> float:
        """Read a number above 0."""
        value = self._entry(path, default)
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.file}: {key_of(path, self._name)}={value!r}: one positive number is needed")
        return float(value)

    def require(self, path: str, wanted: float) -> None:
        """Refuse a value that the known architectures do not have."""
        if (value := self.get(path, wanted)) != wanted:
            raise self.unknown(path, value, f", where it is {wanted}")

    def unknown(self, path: str, value: Any, more: str = "") -> CheckpointError:
        """Make the error for a value that is not known here."""
        return CheckpointError(f"{self.file}: {key_of(path, self._name)}={value!r} is not known here{more}")
