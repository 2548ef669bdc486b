"""The architectures of llama.cpp that are known here, each a short entry.

To add one: read src/models/NAME.cpp of llama.cpp for what it takes for granted (``needs``) and what it reads (``values``), add an
entry, and a model to tests/counterparts/gguf_models.py, which llama.cpp then runs. Names of tensors come from the gguf package.
"""

from __future__ import annotations

from dataclasses import replace

from .entry import Config, Entry, Need, Value


def _width_of_head(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QKVO = tuple(f"self_attn.{leaf}_proj" for leaf in "qkvo")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = tuple(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
_EXPERTS = ("mlp.gate", *(f"mlp.experts.*.{leaf}_proj" for leaf in ("gate", "up", "down")))
_SHARED = ("mlp.shared_expert_gate", *(f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")))
_MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.*.{leaf}" for leaf in ("w1", "w2", "w3")))

_RMS = (Value("Attention.LAYERNORM_RMS_EPS", ("rms_norm_eps",), absent=1e-6),)
_SILU = (Need("hidden_act", "silu"),)
_TANH = (Need("hidden_activation", "gelu_pytorch_tanh"),)
_SQUARE = (Need("head_dim", _width_of_head),)  # heads that together are as wide as the model
_NO_BIAS = (Need("attention_bias", False),)
_NO_WINDOW = (Need("use_sliding_window", False),)
_ALL_SPARSE = (Need("decoder_sparse_step", 1), Need("mlp_only_layers", []))


def _experts(*names: str) -> tuple[Value, ...]:
    used = Value("LLM.EXPERT_USED_COUNT", ("num_experts_per_tok",), int)
    return (Value("LLM.EXPERT_COUNT", names, int), used)


_INNER = Value("LLM.EXPERT_FEED_FORWARD_LENGTH", ("moe_intermediate_size",), int)
_SHARED_INNER = Value("LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH", ("shared_expert_intermediate_size",), int)


def _turned_but_each_fourth(config: Config) -> list[int]:
    return [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def _scale_of_gemma(blocks: int) -> Need:
    """Scale attention by the width of a head; in the largest model, which llama.cpp knows by its ``blocks``, by hidden / heads."""

    def wanted(config: Config) -> int:
        return _width_of_head(config) if config["num_hidden_layers"] == blocks else config.get("head_dim", 256)

    return Need("query_pre_attn_scalar", wanted, absent=256)


_LLAMA = Entry(
    "LLAMA", ("LlamaForCausalLM",), "llama", (*_NORMS, *_QKVO, *_MLP), pairs=True,
    biases={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.down_proj"},
)  # fmt: skip
_GEMMA2 = Entry(
    "GEMMA2", ("Gemma2ForCausalLM",), "gemma2", (*_FOUR_NORMS, *_QKVO, *_MLP), shift=1.0, window=2, head=False,
    values=(
        *_RMS,
        Value("LLM.ATTN_LOGIT_SOFTCAPPING", ("attn_logit_softcapping",), absent=50.0),
        Value("LLM.FINAL_LOGIT_SOFTCAPPING", ("final_logit_softcapping",), absent=30.0),
    ),
    needs=(*_TANH, *_NO_BIAS, _scale_of_gemma(46), Need("use_bidirectional_attention", False)),
)  # fmt: skip
_QWEN2_MOE = Entry(
    "QWEN2MOE", ("Qwen2MoeForCausalLM",), "qwen2_moe", (*_NORMS, *_QKVO, *_EXPERTS, *_SHARED), head=True,
    values=(*_RMS, *_experts("num_experts", "num_local_experts"), _INNER, _SHARED_INNER),
    needs=(*_SILU, *_SQUARE, *_NO_WINDOW, *_ALL_SPARSE, Need("norm_topk_prob", False)), biases={"qkv_bias": "self_attn.q_proj"},
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (
    _LLAMA,
    replace(_LLAMA, classes=("MistralForCausalLM",), model_type="mistral", window="off", biases={}),
    replace(
        _LLAMA, classes=("MixtralForCausalLM",), model_type="mixtral", modules=(*_NORMS, *_QKVO, *_MIXTRAL),
        values=(*_RMS, *_experts("num_local_experts")), window="off", biases={},
    ),
    Entry("QWEN2", ("Qwen2ForCausalLM",), "qwen2", (*_NORMS, *_QKVO, *_MLP), needs=(*_SILU, *_SQUARE, *_NO_WINDOW)),
    Entry(
        "QWEN3", ("Qwen3ForCausalLM",), "qwen3", (*_NORMS, *_QK_NORMS, *_QKVO, *_MLP), needs=(*_SILU, *_NO_WINDOW, *_NO_BIAS),
    ),
    _QWEN2_MOE,
    Entry(
        "QWEN3MOE", ("Qwen3MoeForCausalLM",), "qwen3_moe", (*_NORMS, *_QK_NORMS, *_QKVO, *_EXPERTS),
        values=(*_RMS, *_experts("num_experts", "num_local_experts"), _INNER),
        needs=(*_SILU, *_NO_WINDOW, *_NO_BIAS, *_ALL_SPARSE, Need("norm_topk_prob", True, absent=False)),
    ),
    _GEMMA2,
    replace(
        _GEMMA2, key="GEMMA3", classes=("Gemma3ForCausalLM",), model_type="gemma3_text",
        modules=(*_FOUR_NORMS, *_QK_NORMS, *_QKVO, *_MLP), window=6, head=None, local_rope="own",
        values=(*_RMS, Value("LLM.FINAL_LOGIT_SOFTCAPPING", ("final_logit_softcapping",), optional=True)),
        needs=(
            *_TANH, *_NO_BIAS, _scale_of_gemma(62), Need("use_bidirectional_attention", False),
            Need("attn_logit_softcapping", None),
        ),
    ),
    Entry(
        "PHI3", ("Phi3ForCausalLM",), "phi3",
        (*_NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), window="off", rotary_factor=1.0,
        needs=(*_SILU, *_SQUARE),
    ),
    Entry(
        "GEMMA", ("GemmaForCausalLM",), "gemma", (*_NORMS, *_QKVO, *_MLP), shift=1.0, head=False,
        needs=(Need("hidden_act", "gelu_pytorch_tanh"), *_NO_BIAS, Need("use_bidirectional_attention", False)),
    ),
    replace(
        _LLAMA, key="GRANITE", classes=("GraniteForCausalLM",), model_type="granite",
        values=(
            *_RMS,
            Value("LLM.LOGIT_SCALE", ("logits_scaling",), absent=1.0),
            Value("LLM.RESIDUAL_SCALE", ("residual_multiplier",), absent=1.0),
            Value("LLM.EMBEDDING_SCALE", ("embedding_multiplier",), absent=1.0),
            Value("Attention.SCALE", ("attention_multiplier",), absent=1.0),
        ),
    ),
    replace(
        _LLAMA, key="SMOLLM3", classes=("SmolLM3ForCausalLM",), model_type="smollm3", biases={},
        needs=(*_SILU, *_NO_WINDOW, *_NO_BIAS, Need("mlp_bias", False), Need("no_rope_layers", _turned_but_each_fourth)),
    ),
    Entry(
        "OLMO2", ("Olmo2ForCausalLM",), "olmo2", (*_FOUR_NORMS[1:2], *_FOUR_NORMS[3:], *_QK_NORMS, *_QKVO, *_MLP), head=True,
        values=(replace(_RMS[0], absent=1e-5),), needs=(*_SILU, *_SQUARE, *_NO_BIAS),
    ),
    Entry(
        "OLMO2", ("Olmo3ForCausalLM",), "olmo3", (*_FOUR_NORMS[1:2], *_FOUR_NORMS[3:], *_QK_NORMS, *_QKVO, *_MLP), head=True,
        values=(replace(_RMS[0], absent=1e-5),), needs=(*_SILU, *_SQUARE, *_NO_BIAS), window=4, local_rope="same",
    ),
    Entry(
        "OLMOE", ("OlmoeForCausalLM",), "olmoe", (*_NORMS, *_QK_NORMS, *_QKVO, *_EXPERTS), head=True,
        values=(replace(_RMS[0], absent=1e-5), *_experts("num_experts", "num_local_experts")),
        needs=(
            *_SILU, *_SQUARE, *_NO_BIAS, Need("norm_topk_prob", False), Need("clip_qkv", None),
            Need("num_key_value_heads", lambda config: config["num_attention_heads"]),
        ),
    ),
    Entry(
        "GLM4", ("Glm4ForCausalLM",), "glm4",
        (*_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm", *_QKVO, "mlp.gate_up_proj", "mlp.down_proj"),
        biases={"attention_bias": "self_attn.q_proj"}, values=(replace(_RMS[0], absent=1.5625e-7),), rotary_factor=0.5,
    ),
    Entry(
        "ERNIE4_5", ("Ernie4_5ForCausalLM",), "ernie4_5", (*_NORMS, *_QKVO, *_MLP), values=(replace(_RMS[0], absent=1e-5),),
        needs=(*_SILU, Need("use_bias", False)),
    ),
    replace(
        _LLAMA, key="ARCEE", classes=("ArceeForCausalLM",), model_type="arcee", biases={}, modules=(*_NORMS, *_QKVO, *_MLP[1:]),
        values=(replace(_RMS[0], absent=1e-5),), needs=(Need("hidden_act", "relu2"), *_NO_BIAS, Need("mlp_bias", False)),
    ),
    Entry(
        "SEED_OSS", ("SeedOssForCausalLM",), "seed_oss", (*_NORMS, *_QKVO, *_MLP), biases={"attention_bias": "self_attn.q_proj"},
        needs=(*_SILU, Need("attention_out_bias", False), Need("mlp_bias", False)),
    ),
    Entry(
        "COHERE2", ("Cohere2ForCausalLM",), "cohere2", (*_NORMS[:1], *_QKVO, *_MLP), window=4, head=False,
        values=(
            Value("Attention.LAYERNORM_EPS", ("layer_norm_eps",), absent=1e-5),
            Value("LLM.LOGIT_SCALE", ("logit_scale",), absent=0.0625),
        ),
        needs=(*_SILU, *_SQUARE, *_NO_BIAS, Need("use_qk_norm", False), Need("use_parallel_block", True)),
    ),
    Entry(
        "STABLELM", ("StableLmForCausalLM",), "stablelm", (*_NORMS, *_QKVO, *_MLP), biases={"use_qkv_bias": "self_attn.q_proj"},
        values=(Value("Attention.LAYERNORM_EPS", ("layer_norm_eps",), absent=1e-5),), rotary_factor=0.25, head=True,
        needs=(*_SILU, *_SQUARE, Need("qk_layernorm", False), Need("use_parallel_residual", False)),
    ),
    Entry(
        "STARCODER2", ("Starcoder2ForCausalLM",), "starcoder2", (*_NORMS, *_QKVO, "mlp.c_fc", "mlp.c_proj"), window="off",
        values=(Value("Attention.LAYERNORM_EPS", ("norm_epsilon",), absent=1e-5),),
        needs=(Need("hidden_act", "gelu_pytorch_tanh"), *_SQUARE, Need("use_bias", True)),
    ),
)  # fmt: skip
