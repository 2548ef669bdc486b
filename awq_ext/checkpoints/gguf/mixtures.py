"""Architectures in which a router chooses among experts: see ``architectures``."""

from __future__ import annotations

from dataclasses import replace

from .dense import GRANITE, HUNYUAN, LFM2, LLAMA
from .entry import Entry, Need, Value
from .pieces import (
    ALL_SPARSE,
    AS_MANY_KEYS,
    CORRECTED,
    EXPERTS,
    HUNYUAN_SHARED,
    INNER,
    MIXTRAL,
    MLP,
    NO_BIAS,
    NO_WINDOW,
    NORMS,
    QK_NORMS,
    QKVO,
    RMS,
    RMS_1E5,
    SHARED,
    SHARED_EXPERTS,
    SHARED_INNER,
    SIGMOID,
    SILU,
    SQUARE,
    all_full,
    experts,
    first_dense,
    last,
    share_of_minimax,
)

_INPUT = ("block_sparse_moe.input_linear.weight.*", "shared_mlp.input_linear")  # gate and up in one

_EXPERTS_OF_LFM2 = {
    f"feed_forward.experts.*.{leaf}": f"feed_forward.experts.{other}_proj"
    for leaf, other in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}

_GLM4_MOE = Entry(
    "GLM4_MOE", ("Glm4MoeForCausalLM",), "glm4_moe",
    (*NORMS, *QK_NORMS, *QKVO, *MLP, *EXPERTS, *CORRECTED, *SHARED_EXPERTS), rotary_factor=0.5,
    values=(
        *RMS_1E5, *experts("n_routed_experts"), INNER,
        Value("LLM.EXPERT_SHARED_COUNT", ("n_shared_experts",), int),
        Value("LLM.LEADING_DENSE_BLOCK_COUNT", ("first_k_dense_replace",), int),
        Value("LLM.EXPERT_WEIGHTS_SCALE", ("routed_scaling_factor",), absent=1.0),
        Value("LLM.EXPERT_WEIGHTS_NORM", ("norm_topk_prob",), bool, absent=True),
    ),
    needs=(*SILU, Need("n_group", 1), Need("topk_group", 1)), always=SIGMOID,
    biases={"attention_bias": "self_attn.q_proj", "use_qk_norm": "self_attn.q_norm.weight"},
)  # fmt: skip
_QWEN2_MOE = Entry(
    "QWEN2MOE", ("Qwen2MoeForCausalLM",), "qwen2_moe", (*NORMS, *QKVO, *EXPERTS, *SHARED), head=True,
    values=(*RMS, *experts("num_experts", "num_local_experts"), INNER, SHARED_INNER),
    needs=(*SILU, *SQUARE, *NO_WINDOW, *ALL_SPARSE, Need("norm_topk_prob", False)), biases={"qkv_bias": "self_attn.q_proj"},
)  # fmt: skip
_GRANITE = replace(
    GRANITE, key="GRANITE_MOE", classes=("GraniteMoeForCausalLM",), model_type="granitemoe",
    modules=(*NORMS, *QKVO, "block_sparse_moe.router.layer", _INPUT[0], "block_sparse_moe.output_linear.weight.*"),
    values=(*GRANITE.values, *experts("num_local_experts")), biases={"attention_bias": "self_attn.q_proj"},
    halves={_INPUT[0]: ("block_sparse_moe.experts.gate", "block_sparse_moe.experts.up")},
)  # fmt: skip

MIXTURES: tuple[Entry, ...] = (
    replace(
        LLAMA, classes=("MixtralForCausalLM",), model_type="mixtral", modules=(*NORMS, *QKVO, *MIXTRAL),
        values=(*RMS, *experts("num_local_experts")), window="off", biases={},
    ),
    _QWEN2_MOE,
    Entry(
        "QWEN3MOE", ("Qwen3MoeForCausalLM",), "qwen3_moe", (*NORMS, *QK_NORMS, *QKVO, *EXPERTS),
        values=(*RMS, *experts("num_experts", "num_local_experts"), INNER),
        needs=(*SILU, *NO_WINDOW, *NO_BIAS, *ALL_SPARSE, Need("norm_topk_prob", True, absent=False)),
    ),
    Entry(
        "OLMOE", ("OlmoeForCausalLM",), "olmoe", (*NORMS, *QK_NORMS, *QKVO, *EXPERTS), head=True,
        values=(*RMS_1E5, *experts("num_experts", "num_local_experts")),
        needs=(*SILU, *SQUARE, *NO_BIAS, Need("norm_topk_prob", False), Need("clip_qkv", None), AS_MANY_KEYS),
    ),
    replace(
        HUNYUAN, key="HUNYUAN_MOE", classes=("HunYuanMoEV1ForCausalLM",), model_type="hunyuan_v1_moe",
        modules=(*HUNYUAN.modules[:-3], "mlp.gate.wg", *EXPERTS[1:], *HUNYUAN_SHARED),
        values=(
            *RMS_1E5, experts("num_experts", "num_local_experts")[0],
            Value("LLM.EXPERT_USED_COUNT", ("moe_topk",), int), replace(INNER, names=("intermediate_size",)),
        ),
    ),
    _GLM4_MOE,
    replace(
        _GLM4_MOE, classes=("SolarOpenForCausalLM",), model_type="solar_open", rotary_factor=None,
        modules=(*NORMS, *QKVO, *EXPERTS, *CORRECTED, *SHARED_EXPERTS), biases={"attention_bias": "self_attn.q_proj"},
        values=tuple(value for value in _GLM4_MOE.values if value.key != "LLM.LEADING_DENSE_BLOCK_COUNT"),
        names={"intermediate_size": lambda config: config.get("intermediate_size") or config["moe_intermediate_size"]},
    ),
    replace(
        _GLM4_MOE, key="DOTS1", classes=("Dots1ForCausalLM",), model_type="dots1", rotary_factor=None, biases={}, head=True,
        values=(*RMS, *_GLM4_MOE.values[1:-1], replace(_GLM4_MOE.values[-1], absent=False)),
        needs=(*_GLM4_MOE.needs, *NO_BIAS, Need("layer_types", all_full), AS_MANY_KEYS),
    ),
    replace(
        _GLM4_MOE, key="EXAONE_MOE", classes=("ExaoneMoeForCausalLM",), model_type="exaone_moe", rotary_factor=None, head=True,
        modules=(*NORMS, *QK_NORMS, *QKVO, *MLP, *EXPERTS, "mlp.e_score_correction", *SHARED_EXPERTS), window=4, biases={},
        values=(
            *RMS_1E5, *experts("num_experts", "num_local_experts"), INNER,
            replace(_GLM4_MOE.values[4], names=("num_shared_experts",)), *_GLM4_MOE.values[5:],
        ),
        always=SIGMOID | {
            "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": lambda config: config["num_shared_experts"] * config["moe_intermediate_size"],
        },
        needs=(*_GLM4_MOE.needs, Need("mlp_layer_types", first_dense)),
    ),
    Entry(
        "ERNIE4_5_MOE", ("Ernie4_5_MoeForCausalLM",), "ernie4_5_moe",
        (*NORMS, *QKVO, *MLP, *EXPERTS, "mlp.moe_statics.e_score_correction", *SHARED_EXPERTS),
        values=(
            *RMS_1E5, *experts("moe_num_experts"), INNER,
            Value("LLM.EXPERT_SHARED_COUNT", ("moe_num_shared_experts",), int),
            Value("LLM.LEADING_DENSE_BLOCK_COUNT", ("moe_layer_start_index",), int),
        ),
        names={"num_experts_per_tok": "moe_k"},
        always={
            "LLM.INTERLEAVE_MOE_LAYER_STEP": 1,
            "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": lambda config: (
                config["moe_num_shared_experts"] * config["moe_intermediate_size"]
            ),
        },
        needs=(
            *SILU, Need("use_bias", False), Need("moe_layer_interval", 1), Need("moe_norm_min", 1e-12),
            Need("moe_layer_end_index", last),
        ),
    ),
    Entry(
        "MINIMAXM2", ("MiniMaxM2ForCausalLM",), "minimax_m2",
        (*NORMS, *QK_NORMS, *QKVO, *MIXTRAL, "block_sparse_moe.e_score_correction"), rotary_factor=1.0, head=True,
        values=(*RMS, *experts("num_local_experts"), replace(INNER, names=("intermediate_size",))), always=SIGMOID,
        names={"partial_rotary_factor": share_of_minimax},
    ),
    _GRANITE,
    replace(
        _GRANITE, classes=("GraniteMoeSharedForCausalLM",), model_type="granitemoeshared",
        modules=(*_GRANITE.modules, _INPUT[1], "shared_mlp.output_linear"),
        values=(*_GRANITE.values, replace(SHARED_INNER, names=("shared_intermediate_size",))),
        halves={**_GRANITE.halves, _INPUT[1]: ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj")},
    ),
    replace(
        LFM2, key="LFM2MOE", classes=("Lfm2MoeForCausalLM",), model_type="lfm2_moe", head=False,
        modules=(*LFM2.modules, "feed_forward.gate", *_EXPERTS_OF_LFM2, "feed_forward.expert"),
        called={**_EXPERTS_OF_LFM2, "feed_forward.expert": "feed_forward.expert_bias"}, names={},
        values=(
            *LFM2.values, *experts("num_experts", "num_local_experts"), INNER,
            Value("LLM.LEADING_DENSE_BLOCK_COUNT", ("num_dense_layers",), int, absent=2),
        ),
        needs=(
            *LFM2.needs[:-1], Need("norm_topk_prob", True), Need("use_expert_bias", True), Need("routed_scaling_factor", 1.0),
        ),
        always=SIGMOID,
    ),
)  # fmt: skip
