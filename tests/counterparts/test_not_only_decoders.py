"""Encoders and models that see pictures, in int4, in other tools: they give what awq_ext gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import byte_tokenizer, needed, run
from counterparts.seeing import batch_of, clear_answers, given, noise, processor
from not_only_decoders import (
    Batch,
    as_published,
    bert,
    idefics3,
    int4_layers,
    llava,
    made,
    output,
    picture_batches,
    quantized,
    qwen3_embedding,
    text_batches,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awq_ext

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
BUILD = {"bert": bert, "qwen3_embedding": qwen3_embedding, "llava": llava}
# the patterns of their towers, and of what stands between tower and text
SEEING = {
    "idefics3": (idefics3, "*vision_model*", "*connector*"),
    "llava": (llava, "*vision_tower*", "*multi_modal_projector*"),
}


def int4(name: str) -> tuple[nn.Module, Batch]:
    if name != "llava":
        batches = text_batches()
        return quantized(made(BUILD[name]), batches), batches[0]
    batches = picture_batches()
    return quantized(made(llava), batches, skip=("*multi_modal_projector*", "lm_head")), batches[0]


def theirs(environment: str, folder: Path, batch: Batch, tmp_path: Path) -> tuple[Tensor, str]:
    given, out = tmp_path / "batch.safetensors", tmp_path / "out.safetensors"
    save_file(batch, given)
    run(environment, "transformers_output.py", folder, given, out)
    with safe_open(out, "pt") as file:
        return file.get_tensor("output"), file.metadata()["kernels"]


@pytest.mark.parametrize("name", BUILD)
def test_plain_transformers_runs_compressed_tensors(name: str, tmp_path: Path) -> None:
    needed("compressed-tensors")
    model, batch = int4(name)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors")
    found, ours = theirs("compressed-tensors", folder, batch, tmp_path)[0], output(model, batch)
    # it rounds each weight to the float16 of its scale, a relative 2^-11
    assert (found - ours).norm() < 2e-3 * ours.norm()


@pytest.mark.parametrize("name", BUILD)
def test_plain_transformers_runs_awq_through_gptqmodel(name: str, tmp_path: Path) -> None:
    needed("gptqmodel")
    model, batch = int4(name)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="awq")
    (found, kernels), ours = theirs("gptqmodel", folder, batch, tmp_path), output(model, batch)
    assert "Awq" in kernels
    # bfloat16 throughout, scales and zeros too
    assert (found - ours).norm() < 0.03 * ours.norm()


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["bert", "qwen3_embedding"])
def test_vllm_makes_the_same_embeddings(name: str, layout: str, tmp_path: Path) -> None:
    """Of BERT the state of the first token, of a decoder that of the last: what vLLM takes where a directory says nothing."""
    needed("vllm")
    model, batch = int4(name)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout, tokenizer=byte_tokenizer())
    given, out = tmp_path / "batch.safetensors", tmp_path / "out.safetensors"
    save_file({"input_ids": batch["input_ids"]}, given)
    run("vllm", "vllm_embed.py", folder, given, out)
    ours = output(model, batch)[:, 0 if name == "bert" else -1]
    assert torch.cosine_similarity(load_file(out)["embeddings"], ours, dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("name", "layout", "float_tower", "classes"),
    [
        ("idefics3", "compressed-tensors", True, "vllm"),
        ("idefics3", "awq", False, "vllm"),
        ("llava", "compressed-tensors", True, "transformers"),
        ("llava", "awq", False, "transformers"),
    ],
)
def test_vllm_answers_the_same_about_pictures(
    name: str, layout: str, float_tower: bool, classes: str, tmp_path: Path
) -> None:
    """vLLM gets a text and a picture: it prepares the picture itself, and generates.

    ``classes``: vLLM's own model, or that of Transformers on vLLM's layers. Its own LLaVA cannot be imported without torchvision.
    """
    needed("vllm")
    processing, (build, tower, joint) = processor(name), SEEING[name]
    batches = [batch_of(processing, pictures) for pictures in noise(8, seed=3).split(2)]
    skip = (tower, joint, "lm_head") if float_tower else (joint, "lm_head")
    model = made(build) if name != "llava" else as_published(made(build), tmp_path / "float")
    quantized(model, batches, skip=skip)
    assert any("vision" in each for each in int4_layers(model)) != float_tower
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout, tokenizer=processing)
    (pictures, generated), out = clear_answers(model, processing), tmp_path / "out.safetensors"
    run("vllm", "vllm_see.py", folder, given(tmp_path, pictures), out, classes)
    assert torch.equal(load_file(out)["generated"], generated)
