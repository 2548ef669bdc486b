"""Small random models of many architectures: real classes of transformers, and plain torch ones of unusual shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import awq_ext
from awq_ext.reporting.report import AwqReport

VOCAB, HIDDEN, INNER, LAYERS, HEADS, TOKENS = 64, 32, 64, 2, 4, 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": HIDDEN // HEADS}


@dataclass
class Case:
    """A model and the samples that fit it."""

    model: nn.Module
    batches: list[Any]


def loud(model: nn.Module) -> nn.Module:
    """Redraw the weights of ``model``: as large as in a trained model, with norms and embeddings that make some channels loud."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if name != "weight" and parameter is not None and parameter.dim() == 3:  # fused experts
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if isinstance(module, nn.Embedding):
                weight.copy_(torch.randn_like(weight) * (torch.randn(weight.shape[1]) * 0.8).exp())
            elif weight.dim() == 1:
                # the gain becomes lognormal whether the norm stores it or, as Gemma's, what it exceeds 1 by
                weight.add_((torch.randn_like(weight) * 0.8).exp() - 1)
            elif weight.dim() == 2:
                fan_in = module.in_features if isinstance(module, nn.Linear) else weight.shape[0]
                weight.copy_(torch.randn_like(weight) / fan_in**0.5)
            if isinstance(bias, nn.Parameter):
                bias.copy_(torch.randn_like(bias) * 0.2)
    return model.eval()


def token_batches() -> list[Tensor]:
    """Three batches of token ids, none of them special."""
    return [torch.randint(3, VOCAB, (2, TOKENS)) for _ in range(3)]


def _language_model(config: str, model: str, **settings: Any) -> Case:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return Case(loud(made), [{"input_ids": ids} for ids in token_batches()])


def _llama_like(family: str, **settings: Any) -> Callable[[], Case]:
    return lambda: _language_model(f"{family}Config", f"{family}ForCausalLM", **_GROUPED | settings)


def _older(family: str, **settings: Any) -> Callable[[], Case]:
    return lambda: _language_model(f"{family}Config", f"{family}ForCausalLM", **settings)


def _bert() -> Case:
    return _language_model("BertConfig", "BertForMaskedLM", **_SIZES)


def _t5() -> Case:
    case = _language_model(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    case.batches = [sample | {"decoder_input_ids": sample["input_ids"][:, :9].flip(1)} for sample in case.batches]
    return case


def _vit() -> Case:
    import transformers

    sizes = {name: _SIZES[name] for name in _SIZES if name.startswith(("hidden", "inter", "num"))}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    model = loud(transformers.ViTForImageClassification(config))
    return Case(model, [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)])


def _whisper() -> Case:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=20,
        max_target_positions=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = loud(transformers.WhisperForConditionalGeneration(config))
    return Case(
        model,
        [{"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids[:, :9]} for ids in token_batches()],
    )


def _torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True, activation="relu")
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return Case(loud(model), [torch.randn(2, TOKENS, HIDDEN) for _ in range(3)])


class Pictures(nn.Module):
    """Convolutions with a head of Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(8 * 7 * 7, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Feed(nn.Module):
    """norm -> up -> ReLU -> down -> residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after another: two with one weight (``shared``), all of them ``rounds`` times, or recomputed for gradients."""

    def __init__(self, shared: bool = False, rounds: int = 1, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.rounds = rounds
        self.layers = nn.ModuleList([Feed() for _ in range(3)])
        if shared:
            self.layers[2].up.weight = self.layers[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers] * self.rounds:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def _stack(**settings: Any) -> Callable[[], Case]:
    return lambda: Case(loud(Stack(**settings)), [torch.randn(2, 9, HIDDEN) for _ in range(3)])


def _compiled_stack() -> Case:
    case = _stack()()
    # inductor is tried in test_compile; what matters here is dynamo's wrapper and its traces
    case.model = torch.compile(case.model, backend="eager")
    return case


class Expert(nn.Module):
    """down(silu(gate) * up), as Mixtral's experts were before they were fused."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ExpertList(nn.Module):
    """norm -> each token to the two experts that a router finds best -> residual."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, count, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, -2)
        scores, chosen = self.gate(rows).softmax(-1).topk(2)
        mixed = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == e)
            if len(token):
                mixed.index_add_(0, token, expert(rows[token]) * scores[token, rank, None])
        return x + mixed.view(x.shape)


def experts_in_a_list() -> Case:
    """Two layers of experts that are modules of their own."""
    model = nn.Sequential(ExpertList(), ExpertList())
    return Case(loud(model), [torch.randn(3, TOKENS, HIDDEN) for _ in range(3)])


def _checkpointed_llama() -> Case:
    case = _llama_like("Llama")()
    for module in case.model.modules():
        # the switch that every release has, whatever the method that sets it is called
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    case.model.train()
    return case


_MIXTURE = {"num_experts_per_tok": 2}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NO_SPECIALS = {"bos_token_id": 1, "eos_token_id": 2}
TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "Llama": _llama_like("Llama"),
    "Mistral": _llama_like("Mistral", sliding_window=8),
    "Qwen2": _llama_like("Qwen2"),
    "Qwen3": _llama_like("Qwen3"),
    "Gemma2": _llama_like("Gemma2", query_pre_attn_scalar=8, sliding_window=8),
    "OLMo2": _llama_like("Olmo2"),
    "StableLM": _older("StableLm", **_SIZES, num_key_value_heads=2),
    "Phi": _older("Phi", **_SIZES),
    "GPT-NeoX": _older("GPTNeoX", **_SIZES),
    "Falcon, multi-query": _older(
        "Falcon", **_SIZES, ffn_hidden_size=INNER, parallel_attn=True, multi_query=True, new_decoder_architecture=False
    ),
    "Falcon, new decoder": _older(
        "Falcon", **_SIZES, ffn_hidden_size=INNER, new_decoder_architecture=True, num_kv_heads=2
    ),
    "OPT": _older("OPT", **_SIZES, ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
    "BLOOM": _older("Bloom", **_SIZES, n_layer=LAYERS, n_head=HEADS),
    "MPT": _older("Mpt", vocab_size=VOCAB, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS, expansion_ratio=2),
    "Mixtral": _llama_like("Mixtral", num_local_experts=4, **_MIXTURE),
    "Qwen2-MoE": _llama_like(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48, **_MIXTURE
    ),
    "DeepSeek-V2": _older(
        "DeepseekV2",
        **_SIZES,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **_MIXTURE,
    ),
    "Qwen3-Next": _llama_like(
        "Qwen3Next",
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **_MIXTURE,
    ),
    "gpt-oss": _llama_like("GptOss", num_local_experts=4, sliding_window=8, rope_parameters=_PLAIN_ROPE, **_MIXTURE),
    "Llama 4": lambda: _language_model(
        "Llama4TextConfig", "Llama4ForCausalLM", **_GROUPED, intermediate_size_mlp=48, num_local_experts=4, **_MIXTURE
    ),
    "GPT-2": lambda: _language_model(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, **_NO_SPECIALS
    ),
    "BERT": _bert,
    "T5": _t5,
    "ViT": _vit,
    "Whisper": _whisper,
    "Mamba": _older("Mamba", **_SIZES, state_size=4, use_mambapy=False),
    "Llama, gradient checkpointing": _checkpointed_llama,
}
PLAIN: dict[str, Callable[[], Case]] = {
    "torch.nn.TransformerEncoder": _torch_encoder,
    "convolutions": lambda: Case(loud(Pictures()), [torch.randn(4, 3, 16, 16) for _ in range(3)]),
    "experts in a list": experts_in_a_list,
    "weight shared by two blocks": _stack(shared=True),
    "every block called twice": _stack(rounds=2),
    "gradient checkpointing": _stack(recompute=True),
    "torch.compile": _compiled_stack,
}
NAMES = [*TRANSFORMERS, *PLAIN]
# One of each kind: biases, norms that add 1, experts fused in three ways or in a list, linear attention, a state, an encoder
# beside a decoder, transposed weights, pictures, weights and blocks that are used twice.
KINDS = (
    "Llama",
    "Qwen2",
    "Gemma2",
    "Mixtral",
    "Qwen3-Next",
    "gpt-oss",
    "Llama 4",
    "GPT-2",
    "T5",
    "ViT",
    "Mamba",
    "experts in a list",
    "weight shared by two blocks",
    "every block called twice",
)
SETTINGS: Mapping[str, Any] = {"group_size": 16, "n_grid": 5, "min_tokens": 1, "progress": False}


def make(name: str, seed: int = 0) -> Case:
    """The model called ``name``: the same weights and batches for the same ``seed``."""
    torch.manual_seed(seed)
    return (TRANSFORMERS | PLAIN)[name]()


def make_or_skip(name: str) -> Case:
    """:func:`make` for a test: skipped, loudly, where the model needs transformers and it is not installed."""
    import pytest

    if name in TRANSFORMERS:
        pytest.importorskip("transformers", reason=f"{name} NOT TESTED: pip install 'awq-ext[hf]'")
    return make(name)


def params() -> list[Any]:
    """Every name, for a parametrized test: those that are not in KINDS are only tried exhaustively."""
    import pytest

    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.exhaustive) for name in NAMES]


@cache
def quantized(name: str, fold: str = "auto") -> Case:
    """The quantized model, made once for all tests of a process; they must leave it as it is."""
    case = make_or_skip(name)
    awq_ext.quantize(case.model, case.batches, fold=fold, **SETTINGS)
    return case


def fold_counts(report: AwqReport) -> dict[str, int]:
    """How many scale groups were folded into what."""
    places: dict[str, str] = {}
    for row in report.layers:
        if row.group:
            # an expert may do without a scale that the others of its group have
            places[row.group] = places.get(row.group) or row.applied
    counts = dict.fromkeys(("norm", "linear", "run time", "unscaled"), 0)
    for place in places.values():
        counts[place or "unscaled"] += 1
    return counts
