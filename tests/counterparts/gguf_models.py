"""A small random model of each architecture that GGUF files are written of, in which everything that is special to it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awq_ext

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
# how they are quantized in tests; with FEW, only those that end attention in the first block, to 8 bits
ARCHITECTURES: dict[str, Any] = {
    "symmetric": True,
    "group_size": 32,
    "method": "rtn",
    "fold": "never",
}
FEW: dict[str, Any] = {"only": (r"re:.*\.0\..*(o_proj|out_proj|qkv_proj|dense|attn\.c_proj)",), "bits": 8}
UNTIED = {"tie_word_embeddings": False}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
SIGMOID = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
GRANITE = {
    "attention_bias": True, "logits_scaling": 8.0, "residual_multiplier": 0.4, "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
}  # fmt: skip
# class without Config or ForCausalLM -> settings; after a space, which of several
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "Llama 3": {"rope_parameters": LLAMA3},
    "Llama linear": {"rope_parameters": LINEAR},
    "Mistral": {"head_dim": 32, "sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **UNTIED},
    "Qwen2": {},
    "Qwen2 linear": {"rope_parameters": LINEAR},
    "Qwen3": {"head_dim": 32},
    "Qwen2 yarn": {"rope_parameters": YARN},
    "Qwen3 yarn": {"head_dim": 32, "rope_parameters": YARN},
    "Qwen3Moe yarn": {**MOE, "norm_topk_prob": True, "head_dim": 32, "rope_parameters": YARN},
    "Qwen3 linear": {"head_dim": 32, "rope_parameters": LINEAR},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 64, **UNTIED},
    "Qwen3Moe": {**MOE, "norm_topk_prob": True, "head_dim": 32},
    # 26 and more blocks of the released ones have one with all tokens after each with a window, or after five
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 3},
    "Gemma3 text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    "Gemma3 long": {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7, "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
        },
    },
    "Phi3": {"max_position_embeddings": 256, "original_max_position_embeddings": 256},
    "Phi3 partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}},
    # 48 tokens are more, or fewer, than those that the short factors are for
    "Phi3 long": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    "Phi3 short": {
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 256}, "original_max_position_embeddings": 256,
        "max_position_embeddings": 1024,
    },
    "Gemma": {"head_dim": 32},
    "Granite": {"mlp_bias": True, **GRANITE},
    "GraniteMoe": {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "SmolLM3": {"num_hidden_layers": 5},
    "Olmo2": UNTIED,
    "Olmo3": {"sliding_window": 8, "num_hidden_layers": 5, **UNTIED},
    "Olmoe": {"num_experts_per_tok": 2, "num_experts": 4, "intermediate_size": 32, "num_key_value_heads": 4, **UNTIED},
    "Glm4": {"head_dim": 32, "attention_bias": True},
    "Ernie4_5": {"head_dim": 32},
    "Arcee": {"head_dim": 32},
    "SeedOss": {"head_dim": 32, "attention_bias": True, "attention_out_bias": False},
    "Cohere2": {"sliding_window": 8, "num_hidden_layers": 5, "logit_scale": 0.25, "head_dim": 16},
    "StableLm": {"use_qkv_bias": True, **UNTIED},
    "Starcoder2": {},
    "Cohere": {"logit_scale": 0.25, "head_dim": 16},
    "Olmo": {"clip_qkv": 1.5},
    "Olmo plain": UNTIED,
    "Nemotron": {"head_dim": 16, **UNTIED},
    "Exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3},
    "HunYuanDenseV1": {"head_dim": 32, "pad_token_id": 0},
    "HunYuanDenseV1 alpha": {"head_dim": 32, "pad_token_id": 0, "rope_parameters": ALPHA},
    "HunYuanMoEV1": {"head_dim": 32, "pad_token_id": 0, "num_experts": 4, "moe_topk": 2},
    "Glm": {"head_dim": 16, "attention_bias": True},
    "Glm4Moe": {**SIGMOID, "head_dim": 32, "attention_bias": True, "use_qk_norm": True},
    "Glm4Moe plain": {**SIGMOID, "head_dim": 32, "norm_topk_prob": False},
    "SolarOpen": {**SIGMOID, "head_dim": 32, "attention_bias": True},
    "Dots1": {**SIGMOID, "num_experts_per_tok": 3, "head_dim": 32, "norm_topk_prob": True, "num_key_value_heads": 4, **UNTIED},
    "Ernie4_5_Moe": {
        "head_dim": 32, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 2,
        "num_hidden_layers": 3,
    },
    "MiniMaxM2": {
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **UNTIED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
    },
    "Phi": UNTIED,
    "GPTNeoX": {"hidden_act": "gelu_pytorch_tanh", **UNTIED},
    "GPTNeoX sequential": {"hidden_act": "gelu_pytorch_tanh", "use_parallel_residual": False, **UNTIED},
    "Falcon": {"activation": "gelu_pytorch_tanh", "ffn_hidden_size": 256},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "ExaoneMoe": {**SIGMOID, "num_experts": 4, "num_shared_experts": 2, "num_hidden_layers": 5, "sliding_window": 8, **UNTIED},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "Lfm2": {
        "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 32,
        "pad_token_id": 0,
    },
    "Lfm2Moe": {
        "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1, "pad_token_id": 0,
    },
    "GPTBigCode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}  # fmt: skip


def class_of(name: str) -> str:
    """The class of one of FAMILIES."""
    return "GPT2LMHeadModel" if name == "GPT2" else f"{name.split(maxsplit=1)[0]}ForCausalLM"


def family(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of one of FAMILIES, with the attention that computes all that its config says."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    kind = name.split(maxsplit=1)[0]
    config_class = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config_class(**SIZES | FAMILIES[name], attn_implementation="eager")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # .to(dtype) would round the rotary tables
    try:
        model = getattr(transformers, class_of(name))(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        # what is added to the scores of experts is a buffer
        corrections = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("_bias"))
        for place, parameter in (*model.named_parameters(), *corrections):
            _fill(place, parameter, kind.startswith(("Gemma", "Nemotron")))
    return model.eval()


def _fill(name: str, parameter: Tensor, shifted: bool) -> None:
    """Loud: sums of the size of what they are added to, attention that tells tokens apart, norms and biases that differ."""
    if name.endswith(("e_score_correction_bias", "expert_bias")):
        nn.init.normal_(parameter, std=0.1)  # all experts are chosen still
    elif parameter.dim() == 1:
        nn.init.normal_(parameter, 0.0 if shifted or name.endswith("bias") else 1.0, 0.3)
    else:
        loud = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn")) else 1.0
        embedding = (
            any(part in name for part in ("embed", "wte", "wpe")) and not shifted
        )  # Gemma's are multiplied by the root of their width
        nn.init.normal_(parameter, std=1.0 if embedding else loud * parameter.shape[-1] ** -0.5)


def rounding_as_llama_cpp(model: nn.Module) -> nn.Module:
    """``model``, whose quantized layers round their inputs to 8 bits in groups of 32, as llama.cpp's products of integers do."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        groups = inputs[0].float().unflatten(-1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step > 0, groups / step, 0.0).round()
        return ((codes * step.half().float()).flatten(-2).to(inputs[0].dtype), *inputs[1:])

    for module in model.modules():
        if isinstance(module, awq_ext.QuantLinear):
            module.register_forward_pre_hook(hook)
        elif "GELU" in type(module).__name__.upper():  # which it looks up in a table of float16
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
            module.register_forward_hook(lambda *given: given[-1].half().float())
    return model
