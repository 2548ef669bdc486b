"""Classes of transformers made small by rules on the names of their configs' fields, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import torch
from architectures import HEADS, HIDDEN, INNER, LAYERS, TOKENS, VOCAB, Case, loud
from shrunk_extra import BATCHES, EXTRA, ROWS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

# tables of transformers.models.auto.modeling_auto: model type -> class
KINDS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION")
PIXELS, PATCH, PICTURES, LABELS = 32, 4, 24, 16
HEAD, KV_HEADS = HIDDEN // HEADS, 2

# the first that fits a whole name counts (of a list, the name without its last s); None: the default stays
_RULES: tuple[tuple[str, int | None], ...] = (
    (r".*(token_ids?|token_index|_dropout|_probs?)", None),
    (r"(task_)?type_vocab_size|vocab_size_or.*|num_mel_bins", None),
    (r"(.*_)?vocab_size(_.*)?|.*_vocab", VOCAB),
    (r"(max|n)_(\w+_)?positions?(_embeddings)?|max_seq(uence)?_len(gth)?|context_length|model_max_length", 64),
    (r"(.*_)?(num_(key_value|kv)_heads|multi_query_group_num|num_query_groups)(_\w+)?", KV_HEADS),
    (r"(.*_)?(num_(\w+_)?heads|n_heads?|\w+_attention_heads|attention_heads|index_n_heads)(_\w+)?", HEADS),
    (r"mamba_(d_head|head_dim|headdim)", 2 * HIDDEN // HEADS),
    (r"rotary_dim", HEAD // 2),
    (r"(.*_)?(head_dim|head_size|d_kv|dim_head|headdim|d_head)", HEAD),
    (r"(.*_)?(num_(\w+_)?layers?|n_layers?|(en|de)coder_layers|num_blocks|num_self_attends_per_block)", LAYERS),
    (r".*_layer_period", 2),
    (r".*_layer_offset", 1),
    (r"(.*_)?(num_(\w+_)?experts|n_routed_experts|moe_num_experts|zero_expert_num)", 4),
    (r"(.*_)?(num_experts_per_tok(en)?|top_?k(_experts)?|moe_topk|moe_k|num_selected_experts)", 2),
    (r"topk_group|n_group|num_expert_group|mamba_n_?groups|n_groups", 1),
    (
        r"(.*_)?(intermediate_size(_\w+)?|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|feed_forward_size|d_inner|n_inner)",
        INNER,
    ),
    (
        r"(.*_)?(hidden_size(_\w+)?|d_model|n_embd|embed_dim|embed(ding)?_size|hidden_dim|dim|emb_dim|(lru_)?width|d_latents)",
        HIDDEN,
    ),
    (r"(.*_)?lora_rank|num_latents", 16),
    (r"(.*_)?(sliding_window|window_size|chunk_size|attention_window)", 8),
    (r"image_size", PIXELS),
    (r"patch_size", PATCH),
    (r"depth", 1),
)
# what a class needs though its default is None
_NEEDED = {
    "head_dim": HEAD,
    "num_key_value_heads": KV_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": INNER,
}
_TOKEN_IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "blank_token_id": VOCAB - 1,
}
_LAYER_COUNTS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers")


def classes(kind: str) -> list[tuple[str, str]]:
    """All pairs of model type and class of one of KINDS."""
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return [
        (model_type, name)
        for model_type, found in table.items()
        for name in ((found,) if isinstance(found, str) else found)
    ]


def small_config(config: Any, **extra: Any) -> Any:
    """A config like this default one, but of few and narrow layers."""
    values = dict(vars(config))  # not by attribute, which some refuse of what differs between layers
    values |= {name: values[other] for name, other in config.attribute_map.items() if other in values}
    layers = _layers(values)
    counts = _layer_counts(values)
    found: dict[str, Any] = {}
    for name, default in _defaults(type(config)).items():
        value = values.get(name)
        if hasattr(value, "to_dict"):
            found[name] = small_config(value, **extra.pop(name, {}))
        elif value is None:
            found |= {name: _NEEDED[name]} if name in _NEEDED else {}
        elif layers and type(value) in (list, tuple) and len(value) in counts and len(value) > 1:
            found[name] = [_ruled(name, value[i], values) for i in layers]
        elif layers and _LAYER_COUNTS.fullmatch(name):
            found[name] = len(layers)
        elif default is not None:  # what the config computes by itself it computes again
            found[name] = _ruled(name, value, values)
    return type(config)(**found | extra)


def _defaults(kind: type) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(kind) if field.init]
    return {f.name: f.default_factory if f.default is dataclasses.MISSING else f.default for f in fields}


def _ruled(name: str, value: Any, values: dict[str, Any]) -> Any:
    """The small value for a field that has ``value`` by default."""
    if name in _TOKEN_IDS:
        return value if type(value) is int and value < VOCAB else _TOKEN_IDS[name]
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(_ruled(name, v, values) for v in value)
    if type(value) is not int or value <= 0:
        return value
    spelled = (name, name.removesuffix("s"))
    small = next((number for pattern, number in _RULES if any(re.fullmatch(pattern, one) for one in spelled)), None)
    if small == KV_HEADS and "heads" in name and value == values.get("num_attention_heads"):
        return HEADS  # latent attention, for one, has as many
    return value if small is None else small


def _layer_counts(values: dict[str, Any]) -> set[int]:
    return {v for n, v in values.items() if _LAYER_COUNTS.fullmatch(n) and type(v) is int}


def _layers(values: dict[str, Any]) -> list[int]:
    """The first layer of each kind that the config tells apart, at most four; none where it lists nothing for layers."""
    counts = _layer_counts(values)
    lists = [v for v in values.values() if type(v) in (list, tuple) and len(v) in counts and len(v) > 1]
    if not lists:
        return []
    kinds = [str([each[i] for each in lists if len(each) == len(lists[0])]) for i in range(len(lists[0]))]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:4]
    return first if len(first) >= LAYERS else first * LAYERS


def make(kind: str, model_type: str, name: str, seed: int = 0) -> Case:
    """The class ``name`` of transformers, small, and 24 batches; the same weights and batches for the same ``seed``."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, name)
    config = CONFIG_MAPPING[model_type]()
    parts = [part for part in vars(config).values() if type(part) is model_class.config_class]
    if parts and not isinstance(config, model_class.config_class):
        config = parts[0]  # the text model of a larger one
    extra = {"num_labels": LABELS} if kind == "IMAGE_CLASSIFICATION" else {}
    config = small_config(config, **extra | EXTRA.get(model_type, {}) | EXTRA.get(name, {}))
    torch.manual_seed(seed)
    case = Case(loud(model_class(config)), [])
    make_batch = BATCHES.get(name) or functools.partial(_batch, kind)
    case.batches = [make_batch(config) for _ in range(6)]
    _settle(case)
    case.batches += [
        make_batch(config) for _ in range(18)
    ]  # _settle draws numbers: weights depend on what was drawn before
    return case


@torch.no_grad()
def _settle(case: Case) -> None:
    """Give convolutions weights as large as a trained model's, and the batch norms between them the statistics of a batch."""
    for module in case.model.modules():
        if isinstance(module, _ConvNd):
            module.weight.copy_(torch.randn_like(module.weight) / module.weight[0].numel() ** 0.5)
    norms = [module for module in case.model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        case.model(**case.batches[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _batch(kind: str, config: Any) -> dict[str, Tensor]:
    if kind == "IMAGE_CLASSIFICATION":
        size = getattr(config, "image_size", PIXELS)
        return {"pixel_values": torch.randn(PICTURES, 3, *(size if isinstance(size, (list, tuple)) else (size, size)))}
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    if kind == "SEQ_TO_SEQ_CAUSAL_LM" and getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :9].flip(1)}
    return {"input_ids": ids}
