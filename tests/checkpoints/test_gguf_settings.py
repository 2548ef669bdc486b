"""Every setting that changes what a model computes is in its GGUF file, or is refused: all are changed, one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from counterparts.gguf_models import FAMILIES, class_of, family

from awq_ext.checkpoints.formats import CheckpointError

gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
from awq_ext.checkpoints.gguf.architecture import Architecture  # noqa: E402
from awq_ext.checkpoints.gguf.file import described  # noqa: E402

TOKENS = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
OTHERS: dict[type, tuple[Any, ...]] = {
    str: ("gelu", "relu", "gelu_new", "silu"),
    type(None): (True, 1.5, 8),
}
# names, and what the tensors of a file say
LEFT_OUT = {"architectures", "model_type", "vocab_size", "num_hidden_layers", "n_layer", "tie_word_embeddings"}


def changed(value: Any) -> Iterator[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value // 2)
    elif isinstance(value, float):
        yield from (value * 2 + 0.1, value / 2)
    elif isinstance(value, list) and value:
        words = ("full_attention", "sliding_attention", "sparse", "dense") if isinstance(value[0], str) else (0, 1)
        yield from ([word] * len(value) for word in words)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from ({**value, name: other} for other in changed(inner))
        yield {**value, "partial_rotary_factor": 0.5}
    else:
        yield from OTHERS.get(type(value), ())


def written(config: dict[str, Any]) -> dict[str, str] | None:
    """What a file says of the model; None where it is refused."""
    try:
        known = Architecture(config)
        known.places()
        (said,) = described(known).kv_data
    except CheckpointError:
        return None
    return {name: str(value.value) for name, value in said.items()} | {
        name: str(tensor) for name, tensor in known.tensors().items()
    }


def logits(config: dict[str, Any], like: torch.nn.Module) -> torch.Tensor | None:
    """Of the weights of ``like`` with another config; None where it is no config, or the model has other weights."""
    try:
        settings = type(like.config).from_dict(copy.deepcopy(config), attn_implementation="eager")
        model = type(like)(settings).eval()
        model.load_state_dict(like.state_dict())
        with torch.no_grad():
            return model(TOKENS).logits
    except Exception:  # of whatever reads such a config
        return None


@pytest.mark.parametrize("name", {class_of(name): name for name in reversed(FAMILIES)}.values())
def test_what_changes_logits_is_written_or_refused(name: str) -> None:
    model = family(name)
    config = model.config.to_dict() | {"architectures": [class_of(name)]}
    same, usual = written(config), logits(config, model)
    assert same is not None and usual is not None
    silent = []
    for setting, value in config.items():
        for other in changed(value) if setting not in LEFT_OUT else ():
            if written(config | {setting: other}) != same:
                continue
            found = logits(config | {setting: other}, model)
            if found is not None and not torch.allclose(found, usual, rtol=1e-4, atol=1e-4):
                silent.append(f"{setting}={other!r}")
    assert not silent
