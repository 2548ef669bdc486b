"""Say what llama.cpp calls the tensors and settings of an architecture, by the tables of the ``gguf`` package."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats import CheckpointError

# config.json's architectures -> name of the architecture in the package's tables
KNOWN = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
}
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_OF_A_BLOCK = (
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *(f"self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
)


def gguf() -> Any:
    """Import the gguf package; ImportError with one clear sentence without it."""
    try:
        import gguf as package
    except ImportError as error:
        raise ImportError('GGUF files need the gguf package: pip install "awq-ext[gguf]"') from error
    return package


class Architecture:
    """The one of a config.json. CheckpointError, naming it, for others than those in KNOWN, and for settings not known here."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not config:
            raise CheckpointError("a GGUF file is read by the config.json beside it, which is missing")
        names = config.get("architectures") or [None]
        if names[0] not in KNOWN:
            raise CheckpointError(
                f"GGUF files of {names[0]} are not written or read here; those of {', '.join(KNOWN)} are: use another format"
            )
        self.config, self._key = config, KNOWN[names[0]]
        package = gguf()
        self.kind = package.MODEL_ARCH[self._key]
        self.name = package.MODEL_ARCH_NAMES[self.kind]
        self.blocks, self.heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self._table = package.get_tensor_name_map(self.kind, self.blocks)
        self.rope = self._rope()
        self._refuse_what_is_not_known()

    def _refuse_what_is_not_known(self) -> None:
        """Raise CheckpointError for what llama.cpp would compute differently without a word."""
        config, window = self.config, self.config.get("sliding_window")
        if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
            raise CheckpointError("GGUF: use_sliding_window and other activations than silu are not known here")
        # of Mistral alone the window counts whenever it is given; where it holds every text it changes nothing
        if config["architectures"][0].startswith("Mistral") and window and window < config["max_position_embeddings"]:
            raise CheckpointError(
                f"GGUF: sliding_window={window}: llama.cpp's {self.name} attends to all tokens. Use another format, or, if no text "
                f"is longer than the window, set max_position_embeddings={window} in the float model's config.json"
            )

    def modules(self) -> dict[str, str]:
        """Map the names of the model's modules to those of GGUF."""
        names = [*_OUTSIDE, *(f"model.layers.{i}.{leaf}" for i in range(self.blocks) for leaf in _OF_A_BLOCK)]
        found = {name: self._table.get_name(name) for name in names}
        return {name: there for name, there in found.items() if there is not None}

    def rows(self, name: str, count: int, back: bool = False) -> Tensor | None:
        """Give the order of a module's rows there (``back``: of theirs here); None where it is the same.

        llama.cpp turns the channels 2i and 2i + 1 of a head by one angle, transformers i and i + d/2: in files of its "llama"
        the rows of q and k are put side by side.
        """
        found = re.search(r"\.([qk])_proj$", name)
        if self._key != "LLAMA" or found is None:
            return None
        heads = self.heads if found[1] == "q" else self.kv_heads
        if count % (2 * heads):
            raise CheckpointError(f"{name} has {count} rows, which {heads} heads do not divide")
        order = torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()
        return order.argsort() if back else order

    def tensors(self) -> dict[str, Tensor]:
        """Make those that no file of transformers has: the factors of Llama 3's rotary frequencies."""
        return (
            {}
            if self.rope.get("rope_type") != "llama3"
            else {"rope_freqs.weight": llama3_factors(self.rope, self.head)}
        )

    @property
    def head(self) -> int:
        """Channels of an attention head."""
        return self.config.get("head_dim") or _number(self.config, "hidden_size") // self.heads

    def describe(self, writer: Any) -> None:
        """Add the metadata without which llama.cpp cannot run the model."""
        config = self.config
        writer.add_block_count(self.blocks)
        writer.add_context_length(_number(config, "max_position_embeddings"))
        writer.add_embedding_length(_number(config, "hidden_size"))
        writer.add_feed_forward_length(_number(config, "intermediate_size"))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(float(self.rope.get("rope_theta", 10000.0)))
        writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
        writer.add_vocab_size(_number(config, "vocab_size"))
        if self.rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf().RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))

    def _rope(self) -> Mapping[str, Any]:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise CheckpointError(f"GGUF: rotary embeddings of rope_type={kind!r} are not known here")
        return {"rope_theta": self.config.get("rope_theta", 10000.0), **rope, "rope_type": kind}


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name}={value!r}: a positive number is needed")
    return value


def llama3_factors(rope: Mapping[str, Any], head: int) -> Tensor:
    """Divide rotary frequencies as Llama 3.1 does, fp32 [head / 2]: long waves by ``factor``, short ones by 1, others by less."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    share = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
