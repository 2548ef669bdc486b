"""Encoders and a model that sees pictures, in int4, in other tools: plain Transformers and vLLM give what awq_ext gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import byte_tokenizer, needed, run
from not_only_decoders import (
    IMAGE,
    PATCHES,
    Batch,
    bert,
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


def pictured(folder: Path) -> Path:
    """A picture of random colours, and beside the model the processor that cuts it into patches and texts into bytes."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "!"})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    size = {"height": 32, "width": 32}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pixels, tokenizer, image_token="<image>", **settings).save_pretrained(folder)
    picture = folder.parent / "picture.png"
    colours = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(colours.numpy()).save(picture)
    return picture


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_vllm_sees_the_same(layout: str, tmp_path: Path) -> None:
    """LLaVA with its vision tower in int4: the same tokens after a picture, wherever ours lead clearly."""
    needed("vllm")
    from PIL import Image
    from transformers import AutoProcessor

    model, _ = int4("llava")
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    picture = pictured(folder)
    words, out = list(b"What is it? "), tmp_path / "out.safetensors"
    tokens = torch.tensor([[IMAGE, *words]])
    save_file({"tokens": tokens}, tmp_path / "prompt.safetensors")
    run("vllm", "vllm_see.py", folder, picture, tmp_path / "prompt.safetensors", out)
    found = load_file(out)["generated"]
    pixels = (
        AutoProcessor.from_pretrained(folder).image_processor(Image.open(picture), return_tensors="pt").pixel_values
    )
    ids = torch.cat([torch.full((1, PATCHES), IMAGE), tokens[:, 1:], found], 1)
    logits = output(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    expected = logits[:, -found.shape[1] - 1 : -1]
    lead = expected.topk(2).values.diff(dim=-1).abs()[..., 0] > 0.05 * expected.std()
    assert lead.sum() >= 4 and torch.equal(expected.argmax(-1)[lead], found[lead])
