"""llama.cpp and the gguf package: files written here dequantize to the same weights there, and generate the same tokens."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from counterparts.counterpart import (
    GGUF_SETTINGS,
    clear_prompt,
    needed,
    prompt_file,
    quantized_llama,
    quantized_qwen2,
    run,
    wide_llama,
)
from counterparts.gguf_models import ARCHITECTURES, FAMILIES, FEW, family, rounding_as_llama_cpp
from counterparts.gguf_tokenizers import byte_level, save, sentencepiece, texts
from safetensors.torch import load_file, save_file

import awq_ext
from awq_ext.checkpoints.gguf import tokenizers
from awq_ext.checkpoints.gguf.tokenizers import _NAMES

TOKENS = torch.arange(64)[None]
gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")


@pytest.mark.parametrize("kind", [*GGUF_SETTINGS, "Qwen2"])
def test_llama_cpp_generates_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Qwen2: with biases, and rows in the order of transformers."""
    needed("llama-cpp")
    model = quantized_qwen2(group_size=32) if kind == "Qwen2" else quantized_llama(**GGUF_SETTINGS[kind])
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="gguf")
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("llama-cpp", "llama_cpp_generate.py", folder / "model.gguf", prompt, out)
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    # its products of integers round activations to 8 bits in groups of 32, and keys and values to float16
    assert (ours - theirs["logits"]).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_files_of_its_own_quantizer_are_read_by_themselves(kind: str, tmp_path: Path) -> None:
    """Embedding and layers of blocks, negative scales, in Q4_0 a head of Q6_K, which becomes float: the same logits to rounding."""
    needed("llama-cpp")
    few = {"only": ("*.0.*.o_proj",), "bits": 8, "symmetric": True, "group_size": 32, "method": "rtn", "fold": "never"}
    made = awq_ext.save_pretrained(
        awq_ext.quantize(wide_llama().half(), [TOKENS], **few), tmp_path / "x", format="gguf"
    )
    file, out, prompt = tmp_path / "theirs.gguf", tmp_path / "out.safetensors", prompt_file(tmp_path)
    run("llama-cpp", "llama_cpp_quantize.py", made / "model.gguf", file, kind)
    run("llama-cpp", "llama_cpp_generate.py", file, prompt, out)
    if kind == "Q4_0":
        with pytest.warns(UserWarning, match=r"theirs\.gguf: dequantized to floats, .*: output\.weight \(Q6_K\)$"):
            model = awq_ext.from_pretrained(file)
    else:
        model = awq_ext.from_pretrained(file)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, awq_ext.QuantLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers + (kind == "Q8_0")
    # written here, with scales of both signs; it stays as it is where it is Q8_0 already
    layers.pop("model.layers.0.self_attn.o_proj")
    assert any(bool((layer.scales < 0).any()) for layer in layers.values()) == (kind == "Q4_0")
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    assert (ours - load_file(out)["logits"]).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("name", ["Gemma2", "Mixtral", "Phi3 long", "GPTNeoX", "GPT2", "Nemotron", "Glm4Moe"])
def test_files_of_its_own_quantizer_in_other_architectures(name: str, tmp_path: Path) -> None:
    """Norms with 1 added, experts in one tensor, joined layers and factors of rotary embeddings, all in Q8_0, by themselves."""
    needed("llama-cpp")
    tokens = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
    model = awq_ext.quantize(family(name, torch.float16), [tokens], progress=False, **(ARCHITECTURES | FEW))
    made = awq_ext.save_pretrained(model, tmp_path / "made", format="gguf") / "model.gguf"
    file = tmp_path / "theirs.gguf"
    run("llama-cpp", "llama_cpp_quantize.py", made, file, "Q8_0")
    save_file({"tokens": tokens, "context": torch.tensor(64)}, file.with_suffix(".safetensors"))
    run("llama-cpp", "llama_cpp_logits.py", tmp_path)
    loaded = awq_ext.from_pretrained(file, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        ours = rounding_as_llama_cpp(loaded)(tokens).logits
    assert (ours - load_file(tmp_path / "theirs.out.safetensors")["logits"]).norm() < 0.02 * ours.norm()


def test_llama_cpp_computes_the_same_in_every_architecture(tmp_path: Path) -> None:
    """Random models with all that is special to them: alike to rounding once ours round inputs as its products of integers do."""
    needed("llama-cpp")
    tokens = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
    ours = {}
    for name in FAMILIES:
        for kind, settings in {"few": FEW, "all": {}}.items():
            model = awq_ext.quantize(family(name), [tokens], progress=False, **(ARCHITECTURES | settings))
            made = awq_ext.save_pretrained(model, tmp_path / name / kind, format="gguf", verify=True)
            file = (made / "model.gguf").rename(tmp_path / f"{name} {kind}.gguf")
            save_file({"tokens": tokens, "context": torch.tensor(64)}, file.with_suffix(".safetensors"))
            with torch.no_grad():
                ours[file] = rounding_as_llama_cpp(model)(tokens).logits
    run("llama-cpp", "llama_cpp_logits.py", tmp_path)
    errors = {}
    for file, logits in ours.items():
        theirs = load_file(file.with_suffix(".out.safetensors"))["logits"]
        errors[file.stem] = ((logits - theirs).norm() / logits.norm()).item()
    # a value that lies between two of 8 bits may go either way, which moves logits by up to a percent; what is computed in
    # another way (a window, a norm, a pair of channels) moves them by more than ten
    assert max(errors.values()) < 0.02, errors
    assert sorted(errors.values())[len(errors) // 2] < 1e-4, errors


@pytest.mark.parametrize("kind", ["llama", "gemma", *dict.fromkeys(_NAMES.values())])
def test_llama_cpp_makes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    needed("llama-cpp")
    content = sentencepiece(kind) if kind in ("llama", "gemma") else byte_level(kind)
    tokenizer = save(tmp_path, content, eos_token="</s>" if kind in ("llama", "gemma") else "<|end|>")
    config = {"vocab_size": tokenizer.get_vocab_size() + 5, "bos_token_id": None, "eos_token_id": None}
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    for add in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{add}")(32)
    writer.add_layer_norm_rms_eps(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that tokens differ
        tokenizers.describe(tmp_path, writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "texts.json").write_text(json.dumps(texts()))
    run(
        "llama-cpp",
        "llama_cpp_tokenize.py",
        tmp_path / "vocabulary.gguf",
        tmp_path / "texts.json",
        tmp_path / "out.json",
    )
    for text, (ids, _) in zip(texts(), json.loads((tmp_path / "out.json").read_text()), strict=True):
        assert tokenizer.encode(text).ids == ids, text
