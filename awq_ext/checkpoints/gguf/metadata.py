"""Make config.json of what a GGUF file says of its model: the reverse of ``Architecture.describe``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats import CheckpointError
from .architectures import llama3_factors

# general.architecture -> the class of transformers that computes the same, and its model_type
_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),  # Mistral's models are of this one too
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Llama 3.1's and 3.2's: their factor is the largest of the frequencies', the rest is the same in all of them
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_in(file: Path, reader: Any) -> dict[str, Any]:
    """Make the config of the model in ``file``, opened by ``reader`` (gguf.GGUFReader).

    dtype is that of the float matrices (embedding, head, layers), float32 where there are none.
    CheckpointError that names what is missing or not known.
    """
    said = {name: field.contents() for name, field in reader.fields.items()}
    name = said.get("general.architecture")
    if name not in _CLASSES:
        raise CheckpointError(f"{file}: general.architecture={name!r} is not known here; {', '.join(_CLASSES)} are")
    if said.get("split.count", 1) != 1:
        raise CheckpointError(f"{file} is one of {said['split.count']} parts: join them with llama-gguf-split --merge")
    facts = _Facts(file, name, said)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file} has no token_embd.weight: it holds no language model")
    embedding = tensors["token_embd.weight"]
    heads, width = facts.number("attention.head_count"), facts.number("embedding_length")
    head = facts.number("attention.key_length", width // heads)
    facts.require("attention.value_length", head)
    facts.require("rope.dimension_count", head)
    facts.require("expert_count", 0)
    kind, model_type = _CLASSES[name]
    config = {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": facts.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.number("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": facts.number("feed_forward_length"),
        "max_position_embeddings": facts.number("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dtype(tensors),
        "rope_parameters": facts.rope(head, tensors),
        "quantization_config": {"quant_method": "gguf"},
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    for token in ("bos", "eos"):
        config[f"{token}_token_id"] = said.get(f"tokenizer.ggml.{token}_token_id")
    return config


def _dtype(tensors: Mapping[str, Any]) -> str:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    matrices.sort(key=lambda tensor: tensor.name not in ("token_embd.weight", "output.weight"))
    return next((_FLOATS[name] for tensor in matrices if (name := tensor.tensor_type.name) in _FLOATS), "float32")


class _Facts:
    """The entries of one architecture."""

    def __init__(self, file: Path, name: str, said: Mapping[str, Any]) -> None:
        self._file, self._name, self._said = file, name, said

    def _entry(self, key: str, default: Any = None) -> Any:
        value = self._said.get(f"{self._name}.{key}", default)
        if value is None:
            raise CheckpointError(
                f"{self._file} lacks {self._name}.{key}, without which there is no config: put its config.json beside it, in a "
                "directory that holds it as model.gguf"
            )
        return value

    def number(self, key: str, default: int | None = None) -> int:
        value = self._entry(key, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self._file}: {self._name}.{key}={value!r}: one positive number is needed")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._entry(key, default)
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self._file}: {self._name}.{key}={value!r}: one positive number is needed")
        return float(value)

    def require(self, key: str, wanted: int) -> None:
        """Refuse a value that the known architectures do not have."""
        if (value := self._said.get(f"{self._name}.{key}", wanted)) != wanted:
            raise CheckpointError(f"{self._file}: {self._name}.{key}={value!r} is not known here, where it is {wanted}")

    def rope(self, head: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tell the rotary embeddings, those of Llama 3 by their factors, which are all that the file has of them."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.real("rope.freq_base", 10000.0)}
        scaling = self._said.get(f"{self._name}.rope.scaling.type", "none")
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": self.real("rope.scaling.factor")}
        elif scaling != "none":
            raise CheckpointError(f"{self._file}: {self._name}.rope.scaling.type={scaling!r} is not known here")
        if "rope_freqs.weight" not in tensors:
            return rope
        factors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)).float().flatten()
        rope |= {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **_LLAMA3}
        known = llama3_factors(rope, head)
        if scaling != "none" or factors.shape != known.shape or not torch.allclose(factors, known, rtol=1e-4):
            raise CheckpointError(f"{self._file}: rope_freqs.weight has other factors than Llama 3.1 and 3.2 have")
        return rope
