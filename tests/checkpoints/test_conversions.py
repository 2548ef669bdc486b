"""Names of weights in files and in memory, where transformers renames them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="Renamings of Transformers NOT TESTED: pip install 'awq-ext[hf]'")

import shrunk
from torch import nn

from awq_ext.checkpoints.conversions import Conversions


@pytest.fixture(scope="module")
def inkling() -> nn.Module:
    """Its files have the weight of some projections without ``.weight``: ``k_sconv.weight_proj``."""
    return shrunk.make("CAUSAL_LM", "inkling2_text", "Inkling2ForCausalLM").model


ATTENTION = "model.layers.1.self_attn", "model.llm.layers.1.attn"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("q_proj.weight", "wq_du.weight"), ("k_sconv.weight_proj.weight", "k_sconv.weight_proj")],
)
def test_a_layer_in_files_is_called_like_its_weight(inkling: nn.Module, ours: str, theirs: str) -> None:
    ours, theirs = f"{ATTENTION[0]}.{ours}", f"{ATTENTION[1]}.{theirs}"
    assert Conversions(inkling, to_files=True).find(ours) == (theirs, None)
    assert Conversions(inkling, to_files=False).find(theirs) == (ours, None)
    layer = theirs.removesuffix(".weight")
    assert Conversions(inkling, to_files=False).find_weight(layer) == (ours, None)


def test_a_layer_that_the_model_lacks_has_no_other_name(inkling: nn.Module) -> None:
    found = Conversions(inkling, to_files=False)
    assert found.find_weight("model.llm.layers.1.extra") == ("model.layers.1.extra.weight", None)
    assert Conversions(None, to_files=False).find_weight("a.b") == ("a.b.weight", None)
