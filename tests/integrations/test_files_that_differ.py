"""Files that are not quite what the model is: routers, parts that no class builds, prefixes, heads of their own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_dirs import edit_json, random_layer
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, float_model, load, logits, qwen3, registered  # noqa: F401
from torch import Tensor, nn

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.formats import LAYOUTS, PackedLinear

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")

CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False},
}


def file_tensors(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors of a float model, under the names that files have."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def written(
    folder: Path, tensors: dict[str, Tensor], quantized: Callable[[str], bool], format: str = "awq", rename: Any = None
) -> dict[str, Tensor]:
    """Quantize (at random) in a directory of a float model; returns the float tensors that compute the same."""
    rename = rename or (lambda name: name)
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if tensor.dim() == 2 and quantized(stem):
            layer: PackedLinear = random_layer(*tensor.shape, 16)
            packed = LAYOUTS[format].pack(layer)
            stored |= {rename(f"{stem}.{leaf}"): value.contiguous() for leaf, value in packed.items()}
            plain[rename(name)] = layer.dequantize()
        else:
            stored[rename(name)] = plain[rename(name)] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=CONFIGS[format]))
    return plain


def reference(folder: Path, tensors: dict[str, Tensor], to: Path, kind: Any = None) -> nn.Module:
    """What transformers makes of the same files with float weights."""
    to.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return (kind or transformers.AutoModelForCausalLM).from_pretrained(to, dtype=torch.float32).eval()


def in_blocks(stem: str) -> bool:
    return ".layers." in f".{stem}" and "norm" not in stem


def assert_close(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


# --- layers that are no Linear in memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_a_quantized_router_is_dequantized_into_its_parameter(format: str, tmp_path: Path) -> None:
    tensors = file_tensors(qwen3(8), tmp_path / "x")
    plain = written(tmp_path / "x", tensors, in_blocks, format)
    gate = "model.layers.1.mlp.gate"
    assert f"{gate}.weight" in plain and f"{gate}.weight" not in load_file(tmp_path / "x" / "model.safetensors")
    expected = reference(tmp_path / "x", plain, tmp_path / "plain")
    for model in (
        awq_ext.from_pretrained(tmp_path / "x"),
        load(tmp_path / "x"),
        awq_ext.load(qwen3(8), tmp_path / "x"),
    ):
        assert type(model.get_submodule(gate)) is type(expected.get_submodule(gate))
        assert torch.equal(model.get_parameter(f"{gate}.weight"), plain[f"{gate}.weight"])
        assert isinstance(model.model.layers[1].self_attn.q_proj, QuantLinear)
        assert_close(model, expected)


def test_a_dequantized_router_has_the_dtype_of_the_files_other_weights(tmp_path: Path) -> None:
    tensors = file_tensors(qwen3(8).to(torch.bfloat16), tmp_path)
    written(tmp_path, tensors, in_blocks)
    gate = "model.layers.0.mlp.gate.weight"
    assert awq_ext.from_pretrained(tmp_path).get_parameter(gate).dtype == torch.bfloat16
    assert awq_ext.from_pretrained(tmp_path, dtype=torch.float16).get_parameter(gate).dtype == torch.float16
    assert awq_ext.load(qwen3(8), tmp_path).get_parameter(gate).dtype == torch.bfloat16


def test_a_quantized_embedding(tmp_path: Path) -> None:
    tensors = file_tensors(float_model(), tmp_path / "x")
    plain = written(tmp_path / "x", tensors, lambda stem: in_blocks(stem) or "embed" in stem)
    model = awq_ext.from_pretrained(tmp_path / "x")
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert_close(model, reference(tmp_path / "x", plain, tmp_path / "plain"))


def test_a_linear_with_a_forward_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.router = nn.Linear(32, 32), Router(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.router(self.up(x))

    layers = {"up": random_layer(32, 32, 16, bias=True), "router": random_layer(8, 32, 16, bias=True)}
    tensors = {f"{n}.{leaf}": t.contiguous() for n, x in layers.items() for leaf, t in LAYOUTS["awq"].pack(x).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIGS["awq"]}))
    with torch.device("meta"):
        empty = Model()
    for model in (awq_ext.load(Model(), tmp_path), awq_ext.load(empty, tmp_path)):
        x = torch.randn(5, 32)
        hidden = x @ layers["up"].dequantize().T + layers["up"].bias
        expected = (hidden @ layers["router"].dequantize().T + layers["router"].bias).softmax(-1)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        assert isinstance(model.up, QuantLinear) and type(model.router) is Router


# --- parts that the class does not build ----------------------------------------------------------------------------------


def with_more(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Tensors like those of the first block under other names too."""
    block = {name.partition("layers.0.")[2]: t for name, t in tensors.items() if "layers.0." in name}
    return tensors | {f"{prefix}.{rest}": tensor.clone() for prefix in prefixes for rest, tensor in block.items()}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("mixture", [True, False])
def test_parts_that_no_class_builds_are_left_out_and_named_once(mixture: bool, quantized: bool, tmp_path: Path) -> None:
    model = qwen3(4) if mixture else float_model()
    tensors = with_more(file_tensors(model, tmp_path / "x"), "mtp.layers.0", "model.layers.2", "visual.blocks.0")
    plain = written(
        tmp_path / "x",
        tensors,
        lambda s: in_blocks(s) and "gate." not in f"{s}." and (quantized or ".layers.0" in f".{s}"),
    )
    with pytest.warns(UserWarning, match="they were left out") as told:
        loaded = awq_ext.from_pretrained(tmp_path / "x")
    (warning,) = told
    parts = str(warning.message).rpartition("left out: ")[2].split(", ")
    assert sorted(parts) == ["model.layers.2", "mtp", "visual"]
    assert_close(loaded, reference(tmp_path / "x", plain, tmp_path / "plain"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(logits(load(tmp_path / "x")), logits(loaded))
    fresh = qwen3(4) if mixture else float_model()
    with pytest.raises(CheckpointError, match=r"no such module|that the model lacks"):
        awq_ext.load(fresh, tmp_path / "x")


def test_a_part_that_the_class_itself_leaves_out_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*", "masked_bias"])
    tensors = with_more(file_tensors(float_model(), tmp_path), "mtp.0")
    tensors |= {"model.layers.0.self_attn.masked_bias": torch.ones(1)}
    written(tmp_path, tensors, lambda stem: stem.startswith("model.layers") and in_blocks(stem))
    with pytest.warns(UserWarning, match="left out: mtp$"):
        awq_ext.from_pretrained(tmp_path)


def test_a_part_that_the_class_does_build_must_be_there(tmp_path: Path) -> None:
    tensors = file_tensors(float_model(), tmp_path)
    moved = {name.replace("model.layers.1.", "model.blocks.1."): tensor for name, tensor in tensors.items()}
    written(tmp_path, moved, in_blocks)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\..*, which the model needs"):
        awq_ext.from_pretrained(tmp_path)


# --- names with and without the base model's prefix -----------------------------------------------------------------------


def bare(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("mixture", [True, False])
def test_files_without_the_prefix_of_the_base_model(mixture: bool, tmp_path: Path) -> None:
    model = (
        qwen3(4, tie_word_embeddings=True) if mixture else float_model("Qwen3", head_dim=16, tie_word_embeddings=True)
    )
    tensors = file_tensors(model, tmp_path / "x")
    plain = written(tmp_path / "x", tensors, lambda stem: in_blocks(stem) and "gate." not in f"{stem}.", rename=bare)
    assert "layers.0.self_attn.q_proj.weight" in plain and "lm_head.weight" not in plain
    expected = reference(tmp_path / "x", plain, tmp_path / "plain")
    loaded = awq_ext.from_pretrained(tmp_path / "x")
    assert_close(loaded, expected)
    assert torch.equal(logits(load(tmp_path / "x")), logits(loaded))
    awq_ext.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / "again")), logits(loaded))


def test_a_base_model_from_files_with_the_prefix(tmp_path: Path) -> None:
    tensors = file_tensors(float_model(), tmp_path / "x")
    plain = written(tmp_path / "x", tensors, in_blocks)
    edit_json(tmp_path / "x" / "config.json", lambda config: config.update(architectures=["LlamaModel"]))
    with pytest.warns(UserWarning, match="LlamaModel has no place; they were left out: lm_head"):
        loaded = awq_ext.from_pretrained(tmp_path / "x")
    assert type(loaded) is transformers.LlamaModel and isinstance(loaded.layers[0].mlp.up_proj, QuantLinear)
    expected = reference(tmp_path / "x", plain, tmp_path / "plain", transformers.AutoModel)
    with torch.no_grad():
        found, wanted = (model(BATCH).last_hidden_state for model in (loaded, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# --- a head that differs from the embedding it is tied to -----------------------------------------------------------------


def test_a_head_that_differs_from_the_tied_embedding_stays_a_head(tmp_path: Path) -> None:
    tensors = file_tensors(float_model(tie_word_embeddings=True), tmp_path / "x")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    plain = written(tmp_path / "x", tensors, in_blocks)
    expected = reference(tmp_path / "x", plain, tmp_path / "plain")
    assert torch.equal(expected.lm_head.weight, tensors["lm_head.weight"]), "transformers ties them"
    with pytest.warns(UserWarning, match=r"lm_head\.weight and model\.embed_tokens\.weight with different values"):
        loaded = awq_ext.from_pretrained(tmp_path / "x")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(loaded.get_parameter(name), tensors[name])
    assert_close(loaded, expected)
    assert loaded.all_tied_weights_keys == expected.all_tied_weights_keys == {}
    assert loaded.config.tie_word_embeddings is expected.config.tie_word_embeddings is True
    assert torch.equal(logits(load(tmp_path / "x")), logits(loaded))
    awq_ext.save_pretrained(loaded, tmp_path / "again")
    with pytest.warns(UserWarning, match="with different values"):
        again = awq_ext.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("there", ["both", "head", "embedding"])
def test_a_head_that_is_the_tied_embedding_is_one_tensor_with_it(there: str, tmp_path: Path) -> None:
    tensors = file_tensors(float_model(tie_word_embeddings=True), tmp_path / "x")
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {"lm_head.weight": embedding} if there != "embedding" else {}
    tensors |= {"model.embed_tokens.weight": embedding.clone()} if there != "head" else {}
    written(tmp_path / "x", tensors, in_blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = awq_ext.from_pretrained(tmp_path / "x")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, embedding)
    assert loaded.config.tie_word_embeddings is True


def test_what_is_in_no_file_shares_with_the_embedding_and_not_with_the_head(tmp_path: Path) -> None:
    """T5's encoder and decoder have embeddings tied to ``shared``; the head comes apart alone."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    tensors = file_tensors(model, tmp_path / "x")
    tensors["lm_head.weight"] = torch.randn(64, 32)
    plain = written(tmp_path / "x", tensors, lambda stem: stem.endswith((".wi", ".wo")))
    with pytest.warns(UserWarning, match="with different values"):
        loaded = awq_ext.from_pretrained(tmp_path / "x")
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(loaded.shared.weight, tensors["shared.weight"])
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight is loaded.decoder.embed_tokens.weight
    kind = transformers.T5ForConditionalGeneration
    expected = reference(tmp_path / "x", plain, tmp_path / "plain", kind)
    batch = {"input_ids": BATCH.remainder(64), "decoder_input_ids": BATCH.remainder(64)}
    torch.testing.assert_close(logits(loaded, batch), logits(expected, batch), rtol=1e-4, atol=1e-4)
