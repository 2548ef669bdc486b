"""Models that see pictures: their processors, and pictures that they answer so clearly that others must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import byte_tokenizer
from not_only_decoders import IMAGE, Batch, output
from safetensors.torch import save_file
from torch import Tensor, nn

TEXT = "ab<image>cdefg"
STEPS = 8  # tokens of an answer; of more the least clear one is less clear
MARKS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")  # from IMAGE on
SIDE = 32  # of a picture, in pixels


def processor(name: str) -> Any:
    """Of ``llava`` or ``idefics3``: bytes and MARKS as tokens, and pictures read by PIL, without torchvision."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    assert tokenizer.convert_tokens_to_ids(MARKS[0]) == IMAGE
    if name == "llava":
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        # the tower has one state more than patches, and the first is dropped
        rest = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(transformers.CLIPImageProcessorPil(**sizes), tokenizer, **rest)
    # a picture is not cut into parts: four tokens stand for it
    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    images = transformers.Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def noise(count: int, seed: int) -> Tensor:
    """Pictures uint8 [count, SIDE, SIDE, 3]."""
    shape = (count, SIDE, SIDE, 3)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(processing: Any, pictures: Tensor) -> Batch:
    """TEXT with each of ``pictures``."""
    from PIL import Image

    images = [[Image.fromarray(picture.numpy())] for picture in pictures]
    return dict(processing(text=[TEXT] * len(images), images=images, return_tensors="pt"))


@torch.no_grad()
def clear_answers(model: nn.Module, processing: Any, margin: float = 0.1) -> tuple[Tensor, Tensor]:
    """Two pictures uint8 [2, SIDE, SIDE, 3], and TEXT with each of them and STEPS tokens more, int64 [2, T + STEPS].

    Of 256 pictures those in whose answers the best logit leads most clearly throughout, by more than ``margin``; the second one's
    answer is not that of the first.
    """
    pictures = noise(256, seed=4)
    batch = batch_of(processing, pictures)
    generated = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = batch | {"input_ids": generated, "attention_mask": torch.ones_like(generated)}
    best = output(model, whole)[:, -STEPS - 1 : -1].float().topk(2).values
    leads = (best[..., 0] - best[..., 1]).amin(1)
    first, *others = leads.argsort(descending=True).tolist()
    second = next(each for each in others if not torch.equal(generated[each], generated[first]))
    assert leads[second] > margin, f"too few pictures decide anything: a lead of {leads[second]:.3f}"
    return pictures[[first, second]], generated[[first, second]]


def given(folder: Path, pictures: Tensor) -> Path:
    """A file with TEXT and ``pictures``, for a program."""
    file = folder / "pictures.safetensors"
    save_file({"pictures": pictures}, file, {"text": TEXT, "steps": str(STEPS)})
    return file
