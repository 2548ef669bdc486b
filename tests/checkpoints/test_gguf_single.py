"""GGUF files by themselves: config and tokenizer of their metadata, blocks that become floats, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counterparts.counterpart import byte_tokenizer
from tiny_transformers import float_model, logits
from torch import nn
from typer.testing import CliRunner

import awq_ext
from awq_ext.checkpoints.formats import CheckpointError
from awq_ext.checkpoints.gguf.single import directory_of
from awq_ext.cli import app

gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
BATCH = torch.arange(32)[None]
SETTINGS: dict[str, Any] = {"group_size": 32, "method": "rtn", "fold": "always", "symmetric": True, "progress": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama 3.2": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "Llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"head_dim": 32}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
}


def single(model: nn.Module, folder: Path, **options: Any) -> Path:
    """The model in a file by itself, with nothing beside it."""
    made = awq_ext.save_pretrained(model, folder / "made", format="gguf", **options)
    (folder / "alone").mkdir()
    return (made / "model.gguf").rename(folder / "alone" / "tiny.gguf")


def quantized(family: str = "Llama", **options: Any) -> nn.Module:
    model = float_model(family, torch.float16, **options)
    return awq_ext.quantize(model, [BATCH], **SETTINGS)


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with other metadata (name -> value and type) and tensors (name -> array and type)."""
    reader = gguf.GGUFReader(file)
    fields = {
        name: (field.contents(), field.types[0], field.types[-1])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    fields["general.architecture"] = (reader.fields["general.architecture"].contents(),)
    change(fields, tensors)
    to = file.with_name("other.gguf")
    writer = gguf.GGUFWriter(to, fields.pop("general.architecture")[0])
    for name, (value, kind, of) in fields.items():
        writer.add_key_value(name, value, kind, of if kind == gguf.GGUFValueType.ARRAY else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.mark.parametrize("name", list(MODELS))
def test_a_file_by_itself_computes_the_same(name: str, tmp_path: Path) -> None:
    family, options = MODELS[name]
    model = quantized(family, **options)
    file = single(model, tmp_path)
    loaded = awq_ext.from_pretrained(file)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))
    assert loaded.dtype == torch.float16 and list(file.parent.iterdir()) == [file]
    config = json.loads((directory_of(file) / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] == getattr(model.config, key)
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings
    native = awq_ext.convert(file, tmp_path / "native", "native")
    assert torch.equal(logits(awq_ext.from_pretrained(native), BATCH), logits(model, BATCH))
    assert torch.equal(
        logits(awq_ext.load(float_model(family, torch.float16, **options), file), BATCH), logits(model, BATCH)
    )
    assert awq_ext.from_pretrained(file, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True)])
def test_codes_scales_and_zeros_are_the_same_after_all_ways(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = float_model("Llama", torch.float16)
    awq_ext.quantize(model, [BATCH], **SETTINGS | {"bits": bits, "symmetric": symmetric})
    file = single(model, tmp_path)
    mlx = awq_ext.convert(file, tmp_path / "mlx", "mlx")
    again = awq_ext.convert(awq_ext.convert(mlx, tmp_path / "native", "native"), tmp_path / "again", "gguf")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, awq_ext.QuantLinear)}
    assert len(layers) == 14
    for place in (file, mlx, again):
        loaded = awq_ext.from_pretrained(place)
        for name, layer in layers.items():
            other = loaded.get_submodule(name)
            for leaf in ("qweight", "scales", "zeros", "weight"):
                assert torch.equal(getattr(layer, leaf), getattr(other, leaf)), (place, name, leaf)


def k_quantized(name: str, kind: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Puts random blocks of a type of llama.cpp's in the place of a tensor, which has 256 channels."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]

    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        rows = len(tensors[name][0])
        data = np.random.default_rng(0).integers(0, 256, (rows, 256 // block, size), dtype=np.uint8)
        if kind == "Q6_K":
            data[..., -2:] = np.array([0.001], dtype=np.float16).view(np.uint8)  # of random bytes some are infinite
        if kind == "Q4_1":
            data[..., :4] = np.array([0.01, -0.0333], dtype=np.float16).view(np.uint8)
        tensors[name] = (data.reshape(rows, -1), number)

    return change


@pytest.mark.parametrize(
    "name, kind",
    [
        ("output", "Q6_K"),
        ("token_embd", "Q6_K"),
        ("token_embd", "Q4_0"),
        ("output", "Q8_0"),
        ("blk.1.attn_output", "Q4_1"),
    ],
)
def test_blocks_that_no_layer_holds_become_floats(name: str, kind: str, tmp_path: Path) -> None:
    """As llama.cpp's own quantizer chooses for heads and embeddings; with a warning, unless a head or embedding holds them."""
    file = single(quantized(hidden_size=256, head_dim=64), tmp_path)
    if kind == "Q4_0":
        other = rewritten(
            file, lambda fields, tensors: tensors.update({f"{name}.weight": q4_0(tensors, f"{name}.weight")})
        )
    elif kind == "Q8_0":
        other = rewritten(
            file, lambda fields, tensors: tensors.update({f"{name}.weight": q8_0(tensors, f"{name}.weight")})
        )
    else:
        other = rewritten(file, k_quantized(f"{name}.weight", kind))
    tensor = next(t for t in gguf.GGUFReader(other).tensors if t.name == f"{name}.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    ours = {"output": "lm_head", "token_embd": "model.embed_tokens"}.get(name, "model.layers.1.self_attn.o_proj")
    if kind in ("Q4_0", "Q8_0"):
        loaded = awq_ext.from_pretrained(other)
    else:
        with pytest.warns(UserWarning, match=rf"other\.gguf: dequantized to floats, .*: {name}\.weight \({kind}\)"):
            loaded = awq_ext.from_pretrained(other)
    module = loaded.get_submodule(ours)
    assert isinstance(module, awq_ext.QuantLinear) == (kind == "Q8_0")
    assert loaded.dtype == torch.float16  # as the other of embedding and head
    assert torch.equal(module.weight.float(), expected.half().float())
    assert logits(loaded, BATCH).isfinite().all()


def q4_0(tensors: dict[str, Any], name: str) -> tuple[np.ndarray, Any]:
    kind = gguf.GGMLQuantizationType.Q4_0
    return gguf.quantize(tensors[name][0].astype(np.float32), kind), kind


def q8_0(tensors: dict[str, Any], name: str) -> tuple[np.ndarray, Any]:
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quantize(tensors[name][0].astype(np.float32), kind), kind


def entry(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Changes metadata of a Llama; None takes one away."""
    number, text = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING

    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            fields.pop(key, None)
            if value is not None:
                kind = text if isinstance(value, str) else number
                fields[key] = (value, kind, kind)

    return change


def without_blocks(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name, (data, kind) in tensors.items():
        if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            tensors[name] = (gguf.dequantize(data, kind), gguf.GGMLQuantizationType.F32)


def other_factors(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["rope_freqs.weight"] = (np.linspace(1, 8, 8, dtype=np.float32), gguf.GGMLQuantizationType.F32)


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "another architecture": (entry(general__architecture="mamba"), "general.architecture='mamba' is not known here"),
    "no sizes": (entry(llama__feed_forward_length=None), "lacks llama.feed_forward_length"),
    "a size of 0": (entry(llama__block_count=0), "llama.block_count=0: one positive number"),
    "experts": (entry(llama__expert_count=8), "lacks llama.expert_used_count"),
    "a part": (entry(split__count=3), "one of 3 parts"),
    "partial rotary": (
        entry(llama__rope__dimension_count=8),
        "rope.dimension_count=8 is not known here, where it is 16",
    ),
    "yarn": (entry(llama__rope__scaling__type="yarn"), "rope.scaling.type='yarn' is not known"),
    "other factors": (other_factors, "rope_freqs.weight has other factors"),
    "no embedding": (lambda fields, tensors: tensors.pop("token_embd.weight"), "has no token_embd.weight"),
    "no norm": (lambda fields, tensors: tensors.pop("output_norm.weight"), "lacks model.norm.weight"),
    "a tensor of nobody": (
        lambda fields, tensors: tensors.update({"blk.0.strange.weight": tensors["output_norm.weight"]}),
        r"blk.0.strange.weight \(F32\) is not known",
    ),
    "no blocks": (without_blocks, "no layer of Q4_0, Q8_0, or Q4_1 with whole zeros, only F16, F32"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_missing_or_not_known_is_named(what: str, tmp_path: Path) -> None:
    change, text = REFUSED[what]
    file = rewritten(single(quantized(), tmp_path), change)
    with pytest.raises(CheckpointError, match=text):
        awq_ext.from_pretrained(file)
    with pytest.raises(CheckpointError, match=text):
        awq_ext.convert(file, tmp_path / "out", "native")
        awq_ext.from_pretrained(tmp_path / "out")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = single(quantized(), tmp_path)
    for length in (0, 3, 100, 5000):
        other = tmp_path / f"{length}.gguf"
        other.write_bytes(file.read_bytes()[:length])
        with pytest.raises(CheckpointError, match=f"{length}.gguf is damaged"):
            awq_ext.from_pretrained(other)


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    first = single(quantized(), tmp_path)
    before = directory_of(first)
    assert directory_of(first) == before
    second = single(quantized("Qwen2"), tmp_path / "second")
    second.replace(first)
    assert type(awq_ext.from_pretrained(first)).__name__ == "Qwen2ForCausalLM"
    assert directory_of(first) != before


def with_tokenizer(tmp_path: Path) -> tuple[Path, Any]:
    """A model of 512 tokens and its byte-level tokenizer, of the kind that is written into the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = byte_tokenizer().get_vocab()
    made = Tokenizer(
        models.BPE(vocab=letters | {"la": 256, "laz": 257, "og": 258}, merges=[("l", "a"), ("la", "z"), ("o", "g")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    return single(quantized(vocab_size=512), tmp_path, tokenizer=tokenizer), tokenizer


def unboxed(output: str) -> str:
    """The text of an error that is printed in a frame."""
    return " ".join(output.replace("│", " ").split())


def test_the_commands_take_a_file(tmp_path: Path) -> None:
    file, tokenizer = with_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run = CliRunner().invoke
    done = run(app, ["inspect", str(file), "--json", str(tmp_path / "facts.json")])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["format"] == "gguf" and facts["quantized_layers"] == {"int4": 14}
    assert facts["loaded_by"][0]["command"] == f"llama-cli -m {file}"
    assert f'awq_ext.from_pretrained("{file}")' in {one["command"] for one in facts["loaded_by"]}
    done = run(
        app, ["eval", str(file), str(text), "--seq-len", "32", "--tokens", "128", "--json", str(tmp_path / "e.json")]
    )
    assert done.exit_code == 0, done.output
    assert str(file) in done.output.replace("\n", "") and "awq_ext-" not in done.output  # no temporary directory
    done = run(app, ["report", str(file)])
    assert done.exit_code == 2 and "is a file, which holds no report" in unboxed(done.output)
    done = run(app, ["convert", str(file), str(tmp_path / "new.gguf"), "--format", "gguf"])
    assert done.exit_code == 2 and "a directory is written in every format" in unboxed(done.output)
    done = run(app, ["convert", str(file), str(tmp_path / "out"), "--format", "native"])
    assert done.exit_code == 0, done.output
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("lazy dog").input_ids == tokenizer("lazy dog").input_ids == [257, 121, 32, 100, 258]
    done = run(app, ["quantize", str(file), str(tmp_path / "no"), "--calib", str(text)])
    assert done.exit_code == 2 and "is already int4 (gguf)" in unboxed(done.output)
    done = run(app, ["convert", "models/absent.gguf", str(tmp_path / "no"), "--format", "gguf"])
    assert done.exit_code == 1 and "models/absent.gguf does not exist" in unboxed(done.output)
    done = run(app, ["quantize", "models/absent.gguf", str(tmp_path / "no"), "--calib", str(text)])
    assert done.exit_code == 2 and "models/absent.gguf does not exist" in unboxed(done.output)
    done = run(app, ["inspect", str(text)])
    assert done.exit_code == 2 and "(or a .gguf file)" in unboxed(done.output)


def test_a_model_of_a_file_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    file, _ = with_tokenizer(tmp_path)
    folder = awq_ext.save_pretrained(awq_ext.from_pretrained(file), tmp_path / "out", format="native")
    assert (folder / "tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_read_is_left_out_with_a_warning(tmp_path: Path) -> None:
    file, _ = with_tokenizer(tmp_path)
    text = gguf.GGUFValueType.STRING
    other = rewritten(
        file,
        lambda fields, tensors: (
            fields.update({"tokenizer.ggml.model": ("gpt2", text, text)}) or fields.pop("tokenizer.ggml.tokens")
        ),
    )
    with pytest.warns(UserWarning, match=r"the tokenizer of other\.gguf \(gpt2\) cannot be read"):
        folder = awq_ext.convert(other, tmp_path / "out", "native")
    assert not (folder / "tokenizer.json").exists()


def test_without_float_matrices_the_model_is_float32(tmp_path: Path) -> None:
    """As llama.cpp's own Q4_0 files: a head of Q6_K, an embedding of Q4_0."""

    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        k_quantized("output.weight", "Q6_K")(fields, tensors)
        tensors["token_embd.weight"] = q4_0(tensors, "token_embd.weight")

    other = rewritten(single(quantized(hidden_size=256, head_dim=64), tmp_path), change)
    with pytest.warns(UserWarning, match=r"floats, .*: output\.weight \(Q6_K\)$"):
        loaded = awq_ext.from_pretrained(other)
    found = {
        tensor.name: torch.from_numpy(gguf.dequantize(np.array(tensor.data), tensor.tensor_type))
        for tensor in gguf.GGUFReader(other).tensors
    }
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, found["output.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, found["token_embd.weight"])
    assert logits(loaded, BATCH).isfinite().all()
