"""What small models of some classes need beside the rules."""

from __future__ import annotations

from typing import Any

import torch
from architectures import TOKENS, VOCAB

EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mamba2": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 4)},
    "ReformerForMaskedLM": {"is_decoder": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_shared_experts": 1},
    "qwen4_exp": {"indexer_budget": 16, "indexer_compress_ratio": 4},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"qk_dim_factor": 1.0},
    "led": {"attention_window": 8},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "neomme": {"head_dim": 16},
    "nemo_speechlm": {"blank_token_id": 63},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
}


def _codebooks(kind: str, config: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB, (2 * config.num_codebooks, TOKENS))}


BATCHES: dict[str, Any] = {"MusicgenForCausalLM": _codebooks, "MusicgenMelodyForCausalLM": _codebooks}
