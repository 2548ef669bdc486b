"""Transformers' from_pretrained, generate and save_pretrained on our layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import assert_same_layers, load, registered  # noqa: F401

import awq_ext

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")

FORMATS = ["awq", "gemv", "llm-awq", "native", "modelopt", "compressed-tensors"]


def quantized(kind: str = "Qwen2", **settings: Any) -> Any:
    """A tiny model in int4 that every layout can hold."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    batches = [torch.randint(64, (2, 24)) for _ in range(3)]
    return awq_ext.quantize(model, batches, **({"group_size": 32, "fold": "always", "symmetric": True} | settings))


@pytest.mark.parametrize("layout", FORMATS)
def test_loads_runs_and_saves(layout: str, tmp_path: Path) -> None:
    model = quantized()
    folder = awq_ext.save_pretrained(model, tmp_path / "first", format=layout, max_shard_size="30KB")
    loaded = load(folder)
    assert_same_layers(model, loaded)
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))

    loaded.save_pretrained(tmp_path / "second")
    for again in (load(tmp_path / "second"), awq_ext.from_pretrained(tmp_path / "second")):
        assert_same_layers(model, again)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"per_layer": {"*.down_proj": {"bits": 8}}}])
def test_asymmetric_and_run_time_scales(options: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(symmetric=False, fold="never", **options)
    assert any(getattr(module, "pre_quant_scale", None) is not None for module in model.modules())
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="native")
    loaded = load(folder)
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_keep_the_stored_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized()
    loaded = load(awq_ext.save_pretrained(model, tmp_path / "model"), dtype=dtype)
    assert_same_layers(model, loaded)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded(torch.arange(9)[None]).logits.dtype == dtype


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = quantized("Llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    loaded = load(awq_ext.save_pretrained(model, tmp_path / "model"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "again")
    assert_same_layers(model, load(tmp_path / "again"))


def test_dequantize_gives_ordinary_linears(tmp_path: Path) -> None:
    loaded = load(awq_ext.save_pretrained(quantized(), tmp_path / "model"))
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        before = loaded(tokens).logits
        loaded.dequantize()
        assert not any(isinstance(module, awq_ext.QuantLinear) for module in loaded.modules())
        torch.testing.assert_close(loaded(tokens).logits, before, rtol=1e-4, atol=1e-4)  # same sums in another order
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "float")
    assert load(tmp_path / "float").lm_head.weight.shape == (64, 64)


def test_adapters_can_be_trained(tmp_path: Path) -> None:
    loaded = load(awq_ext.save_pretrained(quantized(), tmp_path / "model"))
    embedded = loaded.get_input_embeddings()(torch.arange(5)[None]).detach().requires_grad_()
    loaded(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and bool(embedded.grad.any())
    assert loaded.hf_quantizer.is_trainable


def test_a_missing_bias_is_an_error(tmp_path: Path) -> None:
    folder = awq_ext.save_pretrained(quantized(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(awq_ext.CheckpointError, match=r"q_proj.*bias in the model only"):
        load(folder)


def test_layers_that_the_model_lacks_are_left_out_and_told(tmp_path: Path) -> None:
    folder = awq_ext.save_pretrained(quantized(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config["layer_types"] = config["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"Qwen2ForCausalLM has no place; they were left out: model\.layers\.1$"):
        assert len(load(folder).model.layers) == 1


def test_a_wrong_size_is_an_error(tmp_path: Path) -> None:
    folder = awq_ext.save_pretrained(quantized(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(awq_ext.CheckpointError, match=r"\(64, 128\) in the files, \(64, 64\) in the model"):
        load(folder)


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map NOT TESTED: pip install accelerate")
    model = quantized()
    folder = awq_ext.save_pretrained(model, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    settings = {"device_map": places, "offload_folder": tmp_path / "offload"}
    loaded = load(folder, **settings)  # of a block on disk only the float tensors are there
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(awq_ext.CheckpointError, match="cannot be kept on disk"):
        load(folder, **settings, offload_buffers=True)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(ValueError, match="'bitsandbytes' is not known, choose among 'awq'"):
        awq_ext.register_with_transformers("bitsandbytes")


def test_by_default_other_packages_keep_their_methods() -> None:
    assert awq_ext.integrations.registration.DEFAULT_METHODS == ("awq", "awq_ext", "modelopt")
