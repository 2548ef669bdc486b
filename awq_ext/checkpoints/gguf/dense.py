"""Architectures in which every token passes all weights of a block: see ``architectures``."""

from __future__ import annotations

from dataclasses import replace

from .entry import Config, Entry, Need, Value
from .pieces import (
    EPS,
    EPSILON,
    FOUR_NORMS,
    HEADS_IN_ONE,
    MLP,
    NO_BIAS,
    NO_WINDOW,
    NORMS,
    POST_NORMS,
    QK_NORMS,
    QKVO,
    RMS,
    RMS_1E5,
    SILU,
    SQUARE,
    TANH,
    all_full,
    as_many_as_heads,
    fewer_blocks,
    scale_of_gemma,
    tanh_form,
    turned_but_each_fourth,
    width_of_head,
)


def _width_of_lfm2(config: Config) -> int:
    """Round two thirds of what config.json says up, as transformers does unless it is told otherwise."""
    width = config.get("block_ff_dim") or config["intermediate_size"]
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if (times := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
        multiple = config.get("block_multiple_of", 256)
        width = -(-int(times * width) // multiple) * multiple
    return width


def _layers_of_lfm2(config: Config) -> list[str]:
    if config.get("layer_types"):
        return config["layer_types"]
    blocks = range(config["num_hidden_layers"])
    full = config.get("full_attn_idxs")
    return ["full_attention" if full is None or i in full else "conv" for i in blocks]


LLAMA = Entry(
    "LLAMA", ("LlamaForCausalLM",), "llama", (*NORMS, *QKVO, *MLP), pairs=True,
    biases={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.down_proj"},
)  # fmt: skip
_GEMMA2 = Entry(
    "GEMMA2", ("Gemma2ForCausalLM",), "gemma2", (*FOUR_NORMS, *QKVO, *MLP), shift=1.0, window=2, head=False,
    values=(
        *RMS,
        Value("LLM.ATTN_LOGIT_SOFTCAPPING", ("attn_logit_softcapping",), absent=50.0),
        Value("LLM.FINAL_LOGIT_SOFTCAPPING", ("final_logit_softcapping",), absent=30.0),
    ),
    needs=(*TANH, *NO_BIAS, scale_of_gemma(46), Need("use_bidirectional_attention", False)),
)  # fmt: skip
_COHERE2 = Entry(
    "COHERE2", ("Cohere2ForCausalLM",), "cohere2", (*NORMS[:1], *QKVO, *MLP), window=4, head=False,
    values=(*EPS, Value("LLM.LOGIT_SCALE", ("logit_scale",), absent=0.0625)),
    needs=(*SILU, *SQUARE, *NO_BIAS, Need("use_qk_norm", False), Need("use_parallel_block", True)),
)  # fmt: skip
GRANITE = replace(
    LLAMA, key="GRANITE", classes=("GraniteForCausalLM",), model_type="granite",
    values=(
        *RMS,
        Value("LLM.LOGIT_SCALE", ("logits_scaling",), absent=1.0),
        Value("LLM.RESIDUAL_SCALE", ("residual_multiplier",), absent=1.0),
        Value("LLM.EMBEDDING_SCALE", ("embedding_multiplier",), absent=1.0),
        Value("Attention.SCALE", ("attention_multiplier",), absent=1.0),
    ),
)  # fmt: skip
HUNYUAN = Entry(
    "HUNYUAN_DENSE", ("HunYuanDenseV1ForCausalLM",), "hunyuan_v1_dense",
    (*NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm", *QKVO, *MLP), needs=(*SILU, *NO_BIAS),
    values=RMS_1E5,
)  # fmt: skip
_STARCODER = Entry(
    "STARCODER", ("GPTBigCodeForCausalLM",), "gpt_bigcode",
    ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), blocks="transformer.h",
    outside=("transformer.wte", "transformer.wpe", "transformer.ln_f"),
    values=EPSILON,
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_key_value_heads": lambda config: 1,
        "head_dim": width_of_head,
        "intermediate_size": lambda config: config.get("n_inner") or 4 * config["hidden_size"],
    },
    needs=(
        tanh_form("activation_function", "gelu_pytorch_tanh", "gelu_pytorch_tanh"), Need("multi_query", True),
        Need("scale_attn_weights", True), Need("add_cross_attention", False),
    ),
)  # fmt: skip

LFM2 = Entry(
    "LFM2", ("Lfm2ForCausalLM",), "lfm2",
    (
        "operator_norm", "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "conv.conv", "conv.in_proj",
        "conv.out_proj", *QKVO[:3], "self_attn.out_proj", "self_attn.q_layernorm", "self_attn.k_layernorm",
    ),
    outside=("model.embed_tokens", "model.embedding_norm"), squeezed="conv.conv", some_attention=True,
    values=(replace(RMS[0], names=("norm_eps",), absent=1e-5), Value("ShortConv.L_CACHE", ("conv_L_cache",), int, absent=3)),
    names={"intermediate_size": _width_of_lfm2, "layer_types": _layers_of_lfm2},
    needs=(
        *SQUARE, Need("conv_bias", False),
        Need("block_auto_adjust_ff_dim", lambda config: config.get("block_auto_adjust_ff_dim", False)),
    ),
)  # fmt: skip

DENSE: tuple[Entry, ...] = (
    LLAMA,
    replace(LLAMA, classes=("MistralForCausalLM",), model_type="mistral", window="off", biases={}),
    Entry("QWEN2", ("Qwen2ForCausalLM",), "qwen2", (*NORMS, *QKVO, *MLP), needs=(*SILU, *SQUARE, *NO_WINDOW)),
    Entry(
        "QWEN3", ("Qwen3ForCausalLM",), "qwen3", (*NORMS, *QK_NORMS, *QKVO, *MLP), needs=(*SILU, *NO_WINDOW, *NO_BIAS),
    ),
    _GEMMA2,
    replace(
        _GEMMA2, key="GEMMA3", classes=("Gemma3ForCausalLM",), model_type="gemma3_text",
        modules=(*FOUR_NORMS, *QK_NORMS, *QKVO, *MLP), window=6, head=None, local_rope="own",
        values=(*RMS, Value("LLM.FINAL_LOGIT_SOFTCAPPING", ("final_logit_softcapping",), optional=True)),
        needs=(
            *TANH, *NO_BIAS, scale_of_gemma(62), Need("use_bidirectional_attention", False),
            Need("attn_logit_softcapping", None),
        ),
    ),
    Entry(
        "PHI3", ("Phi3ForCausalLM",), "phi3",
        (*NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), window="off", rotary_factor=1.0,
        needs=(*SILU, *SQUARE),
    ),
    Entry(
        "GEMMA", ("GemmaForCausalLM",), "gemma", (*NORMS, *QKVO, *MLP), shift=1.0, head=False,
        needs=(Need("hidden_act", "gelu_pytorch_tanh"), *NO_BIAS, Need("use_bidirectional_attention", False)),
    ),
    GRANITE,
    replace(
        LLAMA, key="SMOLLM3", classes=("SmolLM3ForCausalLM",), model_type="smollm3", biases={},
        needs=(*SILU, *NO_WINDOW, *NO_BIAS, Need("mlp_bias", False), Need("no_rope_layers", turned_but_each_fourth)),
    ),
    Entry(
        "OLMO2", ("Olmo2ForCausalLM",), "olmo2", (*POST_NORMS, *QK_NORMS, *QKVO, *MLP), head=True,
        values=RMS_1E5, needs=(*SILU, *SQUARE, *NO_BIAS),
    ),
    Entry(
        "OLMO2", ("Olmo3ForCausalLM",), "olmo3", (*POST_NORMS, *QK_NORMS, *QKVO, *MLP), head=True,
        values=RMS_1E5, needs=(*SILU, *SQUARE, *NO_BIAS), window=4, local_rope="same",
    ),
    Entry(
        "GLM4", ("Glm4ForCausalLM",), "glm4",
        (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm", *QKVO, "mlp.gate_up_proj", "mlp.down_proj"),
        biases={"attention_bias": "self_attn.q_proj"}, values=(replace(RMS[0], absent=1.5625e-7),), rotary_factor=0.5,
    ),
    Entry(
        "ERNIE4_5", ("Ernie4_5ForCausalLM",), "ernie4_5", (*NORMS, *QKVO, *MLP), values=RMS_1E5,
        needs=(*SILU, Need("use_bias", False)),
    ),
    replace(
        LLAMA, key="ARCEE", classes=("ArceeForCausalLM",), model_type="arcee", biases={}, modules=(*NORMS, *QKVO, *MLP[1:]),
        values=RMS_1E5, needs=(Need("hidden_act", "relu2"), *NO_BIAS, Need("mlp_bias", False)),
    ),
    Entry(
        "SEED_OSS", ("SeedOssForCausalLM",), "seed_oss", (*NORMS, *QKVO, *MLP), biases={"attention_bias": "self_attn.q_proj"},
        needs=(*SILU, Need("attention_out_bias", False), Need("mlp_bias", False)),
    ),
    _COHERE2,
    Entry(
        "STABLELM", ("StableLmForCausalLM",), "stablelm", (*NORMS, *QKVO, *MLP), biases={"use_qkv_bias": "self_attn.q_proj"},
        values=EPS, rotary_factor=0.25, head=True,
        needs=(*SILU, *SQUARE, Need("qk_layernorm", False), Need("use_parallel_residual", False)),
    ),
    Entry(
        "STARCODER2", ("Starcoder2ForCausalLM",), "starcoder2", (*NORMS, *QKVO, "mlp.c_fc", "mlp.c_proj"), window="off",
        values=(Value("Attention.LAYERNORM_EPS", ("norm_epsilon",), absent=1e-5),),
        needs=(Need("hidden_act", "gelu_pytorch_tanh"), *SQUARE, Need("use_bias", True)),
    ),
    replace(
        _COHERE2, key="COMMAND_R", classes=("CohereForCausalLM",), model_type="cohere", window=None,
        needs=(*SILU, *SQUARE, *NO_BIAS, Need("use_qk_norm", False), fewer_blocks(64, "norms of q and k")),
    ),
    replace(
        LLAMA, key="OLMO", classes=("OlmoForCausalLM",), model_type="olmo", modules=(*QKVO, *MLP), biases={},
        outside=("model.embed_tokens",), always={"Attention.LAYERNORM_EPS": 1e-5}, needs=(*SILU, *SQUARE, *NO_BIAS),
        values=(Value("Attention.CLAMP_KQV", ("clip_qkv",), optional=True),),
    ),
    Entry(
        "NEMOTRON", ("NemotronForCausalLM",), "nemotron", (*NORMS, *QKVO, *MLP[1:]), shift=1.0, rotary_factor=0.5, head=True,
        values=(replace(EPS[0], names=("norm_eps",)),),
        needs=(Need("hidden_act", "relu2"), *SQUARE, *NO_BIAS, Need("mlp_bias", False)),
    ),
    Entry(
        "EXAONE4", ("Exaone4ForCausalLM",), "exaone4", (*POST_NORMS, *QK_NORMS, *QKVO, *MLP),
        values=RMS_1E5,
        needs=(
            *SILU, *SQUARE, Need("sliding_window", None, absent=4096), fewer_blocks(64, "windows"),
            Need("layer_types", all_full),
        ),
    ),
    HUNYUAN,
    Entry(
        "CHATGLM", ("GlmForCausalLM",), "glm", (*NORMS, *QKVO, "mlp.gate_up_proj", "mlp.down_proj"), rotary_factor=0.5,
        values=(replace(RMS[0], absent=1.5625e-7),), needs=(*SILU, *SQUARE), biases={"attention_bias": "self_attn.q_proj"},
    ),
    Entry(
        "PHI2", ("PhiForCausalLM",), "phi", (*NORMS[:1], *QKVO[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"), head=True,
        outside=("model.embed_tokens", "model.final_layernorm"), values=EPS, rotary_factor=0.5,
        needs=(tanh_form("hidden_act", "gelu_new", "gelu_new"), *SQUARE, Need("qk_layernorm", False)),
    ),
    Entry(
        "GPTNEOX", ("GPTNeoXForCausalLM",), "gpt_neox",
        (*NORMS, "attention.query_key_value", "attention.dense", *HEADS_IN_ONE[2:]), joined="query_key_value", head=True,
        outside=("gpt_neox.embed_in", "gpt_neox.final_layer_norm"), blocks="gpt_neox.layers", rotary_factor=0.25,
        output="embed_out",
        values=(*EPS, Value("LLM.USE_PARALLEL_RESIDUAL", ("use_parallel_residual",), bool, absent=True)),
        names={
            "num_key_value_heads": as_many_as_heads,
            "head_dim": width_of_head,
            "partial_rotary_factor": "rotary_pct",
            "rope_theta": "rotary_emb_base",
        },
        needs=(tanh_form("hidden_act", "gelu_pytorch_tanh", "gelu"), Need("attention_bias", True)),
    ),
    Entry(
        "FALCON", ("FalconForCausalLM",), "falcon", ("input_layernorm", *HEADS_IN_ONE),
        outside=("transformer.word_embeddings", "transformer.ln_f"), blocks="transformer.h",
        values=EPSILON,
        names={
            "num_key_value_heads": lambda config: 1,
            "head_dim": width_of_head,
            "intermediate_size": lambda config: config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        },
        needs=(
            tanh_form("activation", "gelu_pytorch_tanh", "gelu"), Need("alibi", False), Need("bias", False),
            Need("multi_query", True), Need("new_decoder_architecture", False), Need("parallel_attn", True),
        ),
    ),
    Entry(
        "BLOOM", ("BloomForCausalLM",), "bloom", (*NORMS, *HEADS_IN_ONE), joined="query_key_value",
        outside=("transformer.word_embeddings", "transformer.word_embeddings_layernorm", "transformer.ln_f"),
        blocks="transformer.h", values=EPSILON,
        names={
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": as_many_as_heads,
            "head_dim": width_of_head,
            "intermediate_size": lambda config: 4 * config["hidden_size"],
            "max_position_embeddings": lambda config: (
                config.get("max_position_embeddings") or config.get("seq_length") or 2048
            ),
        },
        needs=(Need("apply_residual_connection_post_layernorm", False),),
    ),
    _STARCODER,
    replace(
        _STARCODER, key="GPT2", classes=("GPT2LMHeadModel",), model_type="gpt2", transposed=_STARCODER.modules[2:],
        names=_STARCODER.names | {"num_key_value_heads": as_many_as_heads},
        needs=(
            tanh_form("activation_function", "gelu_new", "gelu_new"), *_STARCODER.needs[2:],
            Need("scale_attn_by_inverse_layer_idx", False),
        ),
    ),
    LFM2,
)  # fmt: skip
