"""What some classes of transformers need beside the rules of shrunk.py to be made small, and batches of an unusual form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import TOKENS, VOCAB
from torch import Tensor

Batch = dict[str, Any]
ROWS = 8  # of a batch

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_LAYERS_ALIKE = {"per_layer_config": {}, "head_dim": 16}
# by model type or class: fields of the config, and of configs in it
EXTRA: dict[str, dict[str, Any]] = {
    # both kinds of layers
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "rwkv": {"num_hidden_layers": 4, "rescale_every": 2},
    # sizes that must fit each other
    "mamba2": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "xlstm": {"hidden_size": 128},
    "neomme": {"head_dim": 16},
    "pegasus_x": {"block_size": 8},
    "led": {"attention_window": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 4)},
    "perceiver": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationLearned": {"image_size": 8},
    "bit": {"num_groups": 4},
    "cvt": {"depth": (1, 2, 3)},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "hgnet_v2": {
        "stage_in_channels": (16, 32, 32, 32),
        "stage_mid_channels": (16,) * 4,
        "stage_out_channels": (32,) * 4,
        "stem_channels": (3, 16, 16),
    },
    "pvt": {"image_size": 64, "patch_sizes": (4, 2, 2, 2)},
    "hiera": {"patch_size": (7, 7)},
    "levit": {"patch_size": 16, "image_size": 64},
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "textnet": {"hidden_sizes": (64, 64, 128, 256, 512)},
    "swin": {"window_size": 2, "image_size": 64},
    "donut-swin": {"window_size": 2, "image_size": 64},
    # what has no default, or none that works
    "ReformerModelWithLMHead": {"is_decoder": True},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "dots3_note": _LAYERS_ALIKE,
    "dots3_note_text": _LAYERS_ALIKE,
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config": {"num_filters": 2},
        "semantic_tokenizer_encoder_config": {"num_filters": 2},
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "image_token_index": 63, "yes_token_index": 3, "no_token_index": 4},
}


def _codebooks(config: Any) -> Batch:
    return {"input_ids": torch.randint(3, VOCAB, (ROWS * config.num_codebooks, TOKENS))}


def _no_cache(config: Any) -> Batch:
    return {"input_ids": torch.randint(3, VOCAB, (ROWS, TOKENS)), "use_cache": False}


def _pixels_as_tokens(config: Any) -> Batch:
    return {"input_ids": torch.randint(3, VOCAB, (ROWS, TOKENS))}


def _patches(config: Any) -> Batch:
    sizes = config.vision_config
    return {
        "pixel_values": torch.randn(ROWS, 16, 3 * sizes.patch_size**2),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    }


def _speech(config: Any) -> Batch:
    frames = 2 * config.downsample_factor * TOKENS
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    return {"input_ids": ids, "input_features": torch.randn(ROWS, config.audio_config.num_mel_bins, frames)}


def _words_about_a_picture(config: Any) -> Batch:
    ids = torch.randint(3, VOCAB - 1, (ROWS, TOKENS))
    ids[:, 1:5] = config.image_token_index
    size = config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(ROWS, 3, size, size)}


BATCHES: dict[str, Callable[[Any], dict[str, Tensor | Any]]] = {
    "BltForCausalLM": _no_cache,
    "ImageGPTForImageClassification": _pixels_as_tokens,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "Siglip2ForImageClassification": _patches,
    "VoxtralRealtimeForConditionalGeneration": _speech,
    "ShieldGemma2ForImageClassification": _words_about_a_picture,
}

# classes that cannot be made: why, and what says so
CANNOT: dict[str, tuple[str, str]] = {
    "Gemma3nForConditionalGeneration": ("needs timm", "requires the timm library"),
    "TimmWrapperForImageClassification": ("needs timm", "requires the timm library"),
    "DinatForImageClassification": ("needs natten", "requires the natten library"),
    "Gemma4AssistantForCausalLM": ("refuses its own default config", "hidden_size_per_layer_input must be 0"),
    "Gemma4UnifiedAssistantForCausalLM": ("shares the states of a larger model", "layer types producing a cache"),
}
