"""GGUF files of each architecture: there and back by themselves, and what llama.cpp would compute otherwise is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.gguf_models import ARCHITECTURES, FAMILIES, SIZES, class_of, family
from torch import nn

import awq_ext
from awq_ext.checkpoints.formats import CheckpointError
from awq_ext.checkpoints.gguf.architectures import ENTRIES

gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
TOKENS = torch.arange(24)[None]
EXPERTS = "re:.*experts.*"


def quantized(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return awq_ext.quantize(family(name, dtype), [TOKENS], progress=False, **(ARCHITECTURES | settings))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_every_architecture_has_a_model_here() -> None:
    assert {class_of(name) for name in FAMILIES} == {name for entry in ENTRIES for name in entry.classes}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_file_by_itself_computes_the_same(name: str, tmp_path: Path) -> None:
    """In bfloat16: what is added to norms is exact in float32, as are the norms that come back."""
    model = quantized(name, torch.bfloat16)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="gguf", verify=True)
    file = (folder / "model.gguf").rename(tmp_path / "alone.gguf")
    loaded = awq_ext.from_pretrained(file, attn_implementation="eager")
    assert type(loaded) is type(model) or name == "Mistral"  # which llama.cpp has as a Llama
    assert torch.equal(logits(loaded), logits(model))
    ours = dict(model.named_parameters())
    for place, parameter in loaded.named_parameters():
        assert torch.equal(parameter, ours[place].to(parameter.dtype)), place


def test_norms_that_lose_bits_compute_the_same(tmp_path: Path) -> None:
    """Weights below 2^-16 and with all bits of float32: 1 + w is what it was, w is not, and the file is verified."""
    model = family("Gemma2")
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if place.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter) * 2.0 ** torch.randint(-30, 0, parameter.shape))
    awq_ext.quantize(model, [TOKENS], progress=False, **ARCHITECTURES)
    loaded = awq_ext.from_pretrained(
        awq_ext.save_pretrained(model, tmp_path / "model", format="gguf", verify=True), attn_implementation="eager"
    )
    assert not torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert torch.equal(logits(loaded), logits(model))


def stacked(file: Path) -> dict[str, tuple[str, list[int]]]:
    tensors = gguf.GGUFReader(file).tensors
    return {each.name: (each.tensor_type.name, each.shape.tolist()) for each in tensors if "exps" in each.name}


def test_experts_are_one_tensor_of_one_type(tmp_path: Path) -> None:
    model = quantized("Mixtral", per_layer={"*.layers.0.*experts.down_proj.*": {"bits": 8}})
    file = awq_ext.save_pretrained(model, tmp_path / "model", format="gguf") / "model.gguf"
    found = stacked(file)
    assert found["blk.0.ffn_down_exps.weight"] == ("Q8_0", [96, 64, 4])  # ggml's order: the last first
    assert found["blk.1.ffn_gate_exps.weight"] == ("Q4_0", [64, 96, 4]) and len(found) == 6
    assert torch.equal(logits(awq_ext.from_pretrained(file, attn_implementation="eager")), logits(model))
    native = awq_ext.convert(file.parent, tmp_path / "native", "native")
    again = awq_ext.convert(native, tmp_path / "again", "gguf", verify=True) / "model.gguf"
    ours, theirs = (
        {each.name: each.data.tobytes() for each in gguf.GGUFReader(path).tensors} for path in (file, again)
    )
    assert ours == theirs
    floats = quantized("Mixtral", skip=(EXPERTS,))
    file = awq_ext.save_pretrained(floats, tmp_path / "floats", format="gguf", verify=True) / "model.gguf"
    assert {kind for kind, _ in stacked(file).values()} == {"F32"}
    assert torch.equal(logits(awq_ext.from_pretrained(file, attn_implementation="eager")), logits(floats))


def test_experts_of_different_types_are_refused(tmp_path: Path) -> None:
    settings = {"per_layer": {"*.layers.1.*experts.down_proj.2": {"bits": 8}}}
    for act in (
        lambda: awq_ext.check_format(family("Qwen3Moe"), TOKENS, "gguf", **(ARCHITECTURES | settings)),
        lambda: awq_ext.save_pretrained(quantized("Qwen3Moe", **settings), tmp_path / "model", format="gguf"),
    ):
        with pytest.raises(
            CheckpointError, match=r"all experts of blk\.1\.ffn_down_exps in one tensor.*experts\.2\.down"
        ):
            act()
    assert not (tmp_path / "model").exists()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts whose shares are not made to add up to 1": ("Qwen3Moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    "blocks without experts": ("Qwen2Moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    "another scale of attention": ("Gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64 .* with 32"),
    "windows in another order": ("Gemma3 text", {"layer_types": ["full_attention"] * 7}, "layer_types=.*each 6. layer"),
    "another activation": ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    "a window that llama.cpp leaves out": ("Phi3", {"sliding_window": 16}, "sliding_window=16.*all tokens"),
    "rotary embeddings in other layers": ("SmolLM3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
    "biases it has none for": ("Olmo2", {"attention_bias": True}, "attention_bias=True"),
    "rotary embeddings of its own": (
        "Olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        "turns the layers with a window as the others",
    ),
    "yarn of another kind": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 8,
            }
        },
        "rope_type='yarn' with beta_fast=8",
    ),
    "yarn": ("Gemma", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    "attention that is not capped": ("Gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
    "GELU that is not the form with tanh": (
        "GPTNeoX",
        {"hidden_act": "gelu"},
        "hidden_act='gelu' .* computes with gelu_pytorch",
    ),
    "one that is so without a word": ("Falcon", {"activation": "gelu"}, "activation='gelu' is not known here"),
    "norms that llama.cpp wants of many blocks": (
        "Cohere",
        {"num_hidden_layers": 64},
        "num_hidden_layers=64 .* norms of q and k",
    ),
    "windows that it has of many blocks": (
        "Exaone4",
        {"num_hidden_layers": 64},
        "num_hidden_layers=64 .* windows from 64",
    ),
    "windows that it has not": ("Exaone4", {"sliding_window": 64}, "sliding_window=64"),
    "dynamic rotary embeddings": (
        "HunYuanDenseV1",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type='dynamic' without an alpha",
    ),
    "groups of experts": ("Glm4Moe", {"n_group": 2}, "n_group=2"),
    "experts in later blocks only": ("Ernie4_5_Moe", {"moe_layer_end_index": 1}, "moe_layer_end_index=1"),
    "a key for each head": ("Falcon", {"multi_query": False}, "multi_query=False"),
    "no size by another name": ("GPT2", {"n_head": None}, "num_attention_heads=None: a positive number"),
    "no number of experts": ("Mixtral", {"num_local_experts": None}, "num_local_experts=None"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_llama_cpp_would_compute_otherwise_is_refused(what: str) -> None:
    from awq_ext.checkpoints.gguf.architecture import Architecture

    name, change, text = REFUSED[what]
    config = family(name).config.to_dict()
    config["architectures"] = [class_of(name)]
    Architecture(config).places()
    with pytest.raises(CheckpointError, match=text):
        Architecture(config | change).places()


def test_an_output_layer_where_there_is_no_place_and_none_where_one_is_needed(tmp_path: Path) -> None:
    """Heads of ints of tied models, and a model that is tied where llama.cpp needs an output layer."""
    tied = quantized("Gemma2", head="int8")
    with pytest.raises(CheckpointError, match=r"llama\.cpp's gemma2 has no tensor for lm_head"):
        awq_ext.save_pretrained(tied, tmp_path / "model", format="gguf")
    import transformers

    config = transformers.StableLmConfig(**SIZES, tie_word_embeddings=True)
    model = transformers.StableLmForCausalLM(config).eval()
    with pytest.raises(CheckpointError, match="stablelm needs an output layer"):
        awq_ext.check_format(model, TOKENS, "gguf", **ARCHITECTURES)
    awq_ext.check_format(model, TOKENS, "gguf", **(ARCHITECTURES | {"head": "int8"}))


def test_a_name_as_of_a_file_is_refused(tmp_path: Path) -> None:
    model = quantized("Qwen2")
    with pytest.raises(CheckpointError, match=r"a directory is written in every format, .*: give \S+/small$"):
        awq_ext.save_pretrained(model, tmp_path / "small.gguf", format="gguf")
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        awq_ext.from_pretrained("models/absent.gguf")


def test_the_language_model_of_gemma3_by_itself(tmp_path: Path) -> None:
    """As docs/formats.md says: without the tower, the same model of text."""
    import transformers

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 28, "patch_size": 14}
    settings = {"text_config": SIZES | FAMILIES["Gemma3 text"], "vision_config": tower, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(**settings, attn_implementation="eager", image_token_index=92)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    text = transformers.Gemma3ForCausalLM(model.config.text_config).eval()
    text.model, text.lm_head = model.model.language_model, model.lm_head
    assert torch.equal(logits(text), logits(model))
    awq_ext.quantize(text, [TOKENS], progress=False, **ARCHITECTURES)
    file = awq_ext.save_pretrained(text, tmp_path / "model", format="gguf", verify=True) / "model.gguf"
    assert torch.equal(logits(awq_ext.from_pretrained(file, attn_implementation="eager")), logits(text))
