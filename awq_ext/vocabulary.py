"""Vocabulary: batches of random tokens, so that calibration also reaches what its texts leave out.

A calibration text uses part of a model's vocabulary; other traffic (other languages, code) lies in directions of the activations
that no calibration row shows, and there errors cost nothing. Tokens drawn evenly from the whole vocabulary show them
(docs/quality.md: "Random tokens beside the calibration text").
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Call
from .blocks import copy_inputs
from .selection import input_embeddings

_IDS = "input_ids"  # and decoder_input_ids
_HINT = " It is one of random tokens: random_tokens=0 leaves them out."
_SPECIAL = ("token_id", "token_ids", "token_index")


def random_calls(model: nn.Module, calls: Sequence[Call], share: float) -> list[Call]:
    """``share`` times as many calls as ``calls`` (rounded; one at least), made from evenly spaced ones: random ids for theirs.

    Ids that the model's config calls special, and those that a mask leaves out, stay. [] where ``share`` is 0 or no token ids can
    be told: the model must have ``get_input_embeddings()``, as those of transformers do, and its calls ``input_ids``.
    """
    tokens = _ordinary_tokens(model) if share > 0 else None
    if tokens is None:
        return []
    generator = torch.Generator().manual_seed(0)
    names = list(inspect.signature(model.forward).parameters)
    count = max(1, round(share * len(calls)))
    drawn = (_drawn(calls[i * len(calls) // count], names, tokens, generator) for i in range(count))
    return [call for call in drawn if call is not None]


def _ordinary_tokens(model: nn.Module) -> Tensor | None:
    """Ids of the vocabulary but for special ones: int64 [V], or None for a model without one."""
    embedding = input_embeddings(model)
    if not isinstance(embedding, nn.Embedding):
        return None
    config = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    size = values.get("vocab_size")
    count = min(embedding.num_embeddings, size) if isinstance(size, int) and size > 0 else embedding.num_embeddings
    ordinary = torch.ones(count, dtype=torch.bool)
    ordinary[[token for token in _special(values) if 0 <= token < count]] = False
    return ordinary.nonzero()[:, 0] if ordinary.any() else None


def _special(values: Mapping[str, Any]) -> Iterator[int]:
    """Every number that a config, or one within it, calls a token's."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(name).endswith(_SPECIAL):
            yield from (one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _drawn(call: Call, names: Sequence[str], tokens: Tensor, generator: torch.Generator) -> Call | None:
    """``call`` with random ids in place of the ordinary ones, or None where it has none."""
    named = dict(zip(names, call.args, strict=False)) | call.kwargs
    ids = [name for name, value in named.items() if name.endswith(_IDS) and _holds_ids(value)]
    if not ids:
        return None
    # what a model writes to, such as a key/value cache, must not be shared with the call it comes from
    args, kwargs = copy_inputs((list(call.args), call.kwargs))
    for name in ids:
        holder, key = (kwargs, name) if name in kwargs else (args, names.index(name))
        holder[key] = _redrawn(holder[key], call, tokens, generator)
    return Call(tuple(args), kwargs, _HINT)


def _holds_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int32, torch.int64)


def _redrawn(ids: Tensor, call: Call, tokens: Tensor, generator: torch.Generator) -> Tensor:
    other = tokens[torch.randint(len(tokens), ids.shape, generator=generator)].to(ids)
    keep = ~torch.isin(ids, tokens.to(ids))
    for mask in call.masks:
        if mask.shape == ids.shape:
            keep |= mask == 0
    return torch.where(keep, ids, other)
