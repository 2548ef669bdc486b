"""The repeated blocks of a model: found, given by name, and what is around some of them."""

from __future__ import annotations

import models
import pytest
from torch import nn

from awq_ext.forwards.lockstep import Block
from awq_ext.survey.blocks import blocks_around, blocks_named, find_blocks, linears_of


def names(model: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(model)]


def test_blocks_of_a_module_list() -> None:
    assert names(models.Net()) == ["layers.0", "layers.1", "layers.2"]


def test_blocks_of_a_sequential_of_one_class() -> None:
    assert names(models.sequential_mlp()) == ["0", "1", "2"]


def test_outermost_lists_only() -> None:
    inner = nn.Module()
    inner.experts = nn.ModuleList(models.MlpBlock() for _ in range(2))
    outer = nn.Module()
    outer.layers = nn.ModuleList([inner, models.MlpBlock()])
    outer.other = nn.ModuleList([models.MlpBlock(), models.MlpBlock()])
    assert names(outer) == ["layers.0", "layers.1", "other.0", "other.1"]


def test_stages_of_layers() -> None:
    """A list is never called, whatever it holds."""

    def stage() -> nn.ModuleList:
        return nn.ModuleList(models.MlpBlock() for _ in range(2))

    model = nn.Module()
    model.stages = nn.ModuleList([stage(), nn.ModuleDict({"x": models.MlpBlock()}), models.MlpBlock()])
    model.other = nn.ModuleList([nn.ModuleList([nn.ReLU(), models.MlpBlock()]), stage()])
    assert names(model) == ["stages.0.0", "stages.0.1", "stages.1.x", "stages.2", "other.1.0", "other.1.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        nn.ModuleDict({"a": models.MlpBlock()}),
        nn.ModuleList([models.MlpBlock()]),
        nn.ModuleList([models.MlpBlock(), nn.ReLU()]),
    ],
    ids=["plain", "linears", "dict", "one", "mixed"],
)
def test_no_repeated_blocks_means_one_block(model: nn.Module) -> None:
    (block,) = find_blocks(model)
    assert block == Block("", model)


def test_blocks_by_name() -> None:
    model = models.Net()
    assert blocks_named(model, ["layers.2", "layers.0"]) == [
        Block("layers.2", model.layers[2]),
        Block("layers.0", model.layers[0]),
    ]
    assert blocks_named(model, []) == [Block("", model)]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["layers.0", "layers.7"], ValueError, "Net has no module 'layers.7'"),
        (["layers.0", "layers.0.mlp"], ValueError, "'layers.0' and 'layers.0.mlp' overlap"),
        (["layers.0.mlp", "layers.0"], ValueError, "'layers.0.mlp' and 'layers.0' overlap"),
        (["layers.0", "layers.0"], ValueError, "'layers.0' and 'layers.0' overlap"),
        ("layers.0", TypeError, "a sequence of module names"),
    ],
    ids=str,
)
def test_bad_names_of_blocks(given: list[str] | str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        blocks_named(models.Net(), given)


def test_linears_of_a_block_are_itself_and_those_below_it() -> None:
    names = dict.fromkeys(["a", "a.b", "ab", "c.a"])
    assert list(linears_of(Block("a", nn.Identity()), names)) == ["a", "a.b"]
    assert list(linears_of(Block("", nn.Identity()), names)) == list(names)


def mixture() -> nn.Module:
    """front.0, front.1 and, beside them, body.layers.0.experts.{0, 1}: repeated modules all of them."""
    model = nn.Module()
    model.front = nn.ModuleList([models.MlpBlock(), models.MlpBlock()])
    layer = nn.Module()
    layer.experts = nn.ModuleList([models.MlpBlock(), models.MlpBlock()])
    model.body = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    return model


def test_what_is_around_experts_is_as_large_as_no_other_block_allows() -> None:
    model = mixture()
    blocks = find_blocks(model)
    assert names(model) == ["front.0", "front.1", "body.layers.0.experts.0", "body.layers.0.experts.1"]
    # body is a ModuleDict and layers a ModuleList: neither is called
    around = blocks_around(model, blocks, ["body.layers.0"])
    assert [block.name for block in around] == ["front.0", "front.1", "body.layers.0"]
    assert around[-1].module is model.body["layers"][0]
    del model.front
    assert blocks_around(model, find_blocks(model), ["body.layers.0"]) == [Block("", model)]
