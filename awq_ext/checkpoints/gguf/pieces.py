"""What entries of architectures are made of: names of modules, settings, and what llama.cpp takes for granted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .entry import Config, Need, Value


def width_of_head(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


def as_many_as_heads(config: Config) -> int:
    return config["num_attention_heads"]


def all_full(config: Config) -> list[str]:
    return ["full_attention"] * config["num_hidden_layers"]


def last(config: Config) -> int:
    """Take -1 for the last layer too."""
    return -1 if config.get("moe_layer_end_index") == -1 else config["num_hidden_layers"] - 1


def first_dense(config: Config) -> list[str]:
    dense = config.get("first_k_dense_replace", 1)
    return ["dense"] * dense + ["sparse"] * (config["num_hidden_layers"] - dense)


def share_of_minimax(config: Config) -> float:
    dims = config.get("rotary_dim")
    return dims / config["head_dim"] if dims else config.get("partial_rotary_factor", 1.0)


NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST_NORMS = FOUR_NORMS[1::2]
QKVO = tuple(f"self_attn.{leaf}_proj" for leaf in "qkvo")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
MLP = tuple(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
EXPERTS = ("mlp.gate", *(f"mlp.experts.*.{leaf}_proj" for leaf in ("gate", "up", "down")))
SHARED = ("mlp.shared_expert_gate", *(f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")))
MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.*.{leaf}" for leaf in ("w1", "w2", "w3")))

CORRECTED = ("mlp.gate.e_score_correction",)  # with _bias, which is that of no layer
SHARED_EXPERTS = tuple(f"mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down"))
HUNYUAN_SHARED = tuple(f"mlp.shared_mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
HEADS_IN_ONE = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

EPS = (Value("Attention.LAYERNORM_EPS", ("layer_norm_eps",), absent=1e-5),)
EPSILON = (replace(EPS[0], names=("layer_norm_epsilon",)),)
RMS = (Value("Attention.LAYERNORM_RMS_EPS", ("rms_norm_eps",), absent=1e-6),)
RMS_1E5 = (replace(RMS[0], absent=1e-5),)
SILU = (Need("hidden_act", "silu"),)
TANH = (Need("hidden_activation", "gelu_pytorch_tanh"),)
SQUARE = (Need("head_dim", width_of_head),)  # heads that together are as wide as the model
AS_MANY_KEYS = Need("num_key_value_heads", as_many_as_heads)
NO_BIAS = (Need("attention_bias", False),)
NO_WINDOW = (Need("use_sliding_window", False),)
SIGMOID = {"LLM.EXPERT_GATING_FUNC": 2}  # experts are chosen by sigmoids of their scores
ALL_SPARSE = (Need("decoder_sparse_step", 1), Need("mlp_only_layers", []))


def experts(*names: str) -> tuple[Value, ...]:
    used = Value("LLM.EXPERT_USED_COUNT", ("num_experts_per_tok",), int)
    return (Value("LLM.EXPERT_COUNT", names, int), used)


INNER = Value("LLM.EXPERT_FEED_FORWARD_LENGTH", ("moe_intermediate_size",), int)
SHARED_INNER = Value("LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH", ("shared_expert_intermediate_size",), int)


def turned_but_each_fourth(config: Config) -> list[int]:
    return [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def tanh_form(name: str, usual: str, absent: str) -> Need:
    """Take one of the names of the form of GELU with tanh, which is what llama.cpp computes."""
    forms = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    return Need(name, lambda config: config.get(name) if config.get(name) in forms else usual, absent=absent)


def fewer_blocks(count: int, what: str) -> Need:
    """Refuse as many blocks and more, by whose number llama.cpp knows another model."""

    def wanted(config: Config) -> Any:
        return config["num_hidden_layers"] if config["num_hidden_layers"] < count else f"{what} from {count} blocks on"

    return Need("num_hidden_layers", wanted)


def scale_of_gemma(blocks: int) -> Need:
    """Scale attention by the width of a head; in the largest model, which llama.cpp knows by its ``blocks``, by hidden / heads."""

    def wanted(config: Config) -> int:
        return width_of_head(config) if config["num_hidden_layers"] == blocks else config.get("head_dim", 256)

    return Need("query_pre_attn_scalar", wanted, absent=256)
