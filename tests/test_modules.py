"""Questions that are asked of any module."""

from __future__ import annotations

import models
import torch
from torch import nn

from awq_ext.modules import foldable_norms, norm_candidates, parameter_owners, take_hooks, unwrapped


def test_norm_candidates() -> None:
    block = models.LlamaBlock()
    assert list(norm_candidates(block)) == ["input_norm", "post_norm"]
    holder = nn.ModuleDict(
        {
            "ln": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
            "wide": nn.LayerNorm((2, 4)),
            "bare": nn.LayerNorm(4, elementwise_affine=False),
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(4, 4),
        }
    )
    assert list(norm_candidates(holder)) == ["ln", "rms"]


def test_owners_are_all_names_of_a_parameter() -> None:
    model = models.TiedNet()
    assert sorted(parameter_owners(model)[id(model.embed.weight)]) == ["embed.weight", "lm_head.weight"]
    bare = nn.Linear(2, 2, bias=False)
    assert parameter_owners(bare) == {id(bare.weight): ["weight"]}


def test_norms_with_shared_parameters_cannot_be_folded_into() -> None:
    model = nn.ModuleDict({"one": nn.LayerNorm(4), "two": nn.LayerNorm(4), "other": nn.LayerNorm(4)})
    model["two"].bias = model["one"].bias
    assert list(foldable_norms(model)) == ["other"]


def test_the_model_behind_a_compiled_one() -> None:
    model, compiled = nn.Linear(2, 2), nn.Module()
    compiled._orig_mod = model  # as torch.compile keeps it
    assert unwrapped(compiled) is unwrapped(model) is model


def test_hooks_move_along_with_their_handles() -> None:
    old, new, seen = nn.Identity(), nn.Identity(), []
    handle = old.register_forward_hook(lambda *_: seen.append("forward"))
    take_hooks(new, old)
    new(torch.zeros(1))
    handle.remove()
    new(torch.zeros(1))
    assert seen == ["forward"]
