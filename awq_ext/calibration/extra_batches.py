"""Extra batches of random tokens and of text sampled from the model, for what the calibration texts leave out.

A calibration text uses part of a model's vocabulary. Other text (other languages, code) lies in directions of the activations
in which no calibration row lies, so that errors there cost nothing. Tokens drawn evenly from the whole vocabulary reach them, and
so does what the model writes (docs/research.md: "Random tokens and the model's own text beside the calibration text").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards.calls import Call
from ..modules import input_embeddings
from .sampled_text import can_generate, generated_tokens

_IDS = "input_ids"  # and decoder_input_ids
_RANDOM_HINT = " It is one of random tokens: random_tokens=0 leaves them out."
_GENERATED_HINT = " It is one that the model wrote: generated_tokens=0 leaves them out."
_SPECIAL = ("token_id", "token_ids", "token_index")
# A function of ordinary ids [V], how many are needed, the longest window that they go to and a generator: as many ids or more.
_Source = Callable[[Tensor, int, int, torch.Generator], Tensor]


def random_calls(model: nn.Module, calls: Sequence[Call], share: float) -> list[Call]:
    """Make ``share`` times as many calls as ``calls`` (rounded; at least one): evenly spaced ones with random ids in them.

    Ids that the model's config calls special stay, as do those that a mask leaves out. Returns [] where ``share`` is 0 or token
    ids are not known: the model must have ``get_input_embeddings()``, as those of transformers do, and its calls ``input_ids``.
    """

    def drawn(tokens: Tensor, count: int, longest: int, generator: torch.Generator) -> Tensor:
        return tokens[torch.randint(len(tokens), (count,), generator=generator)]

    return _calls_of(model, calls, share, drawn, _RANDOM_HINT)


def generated_calls(
    model: nn.Module,
    calls: Sequence[Call],
    share: float,
    progress: bool = False,
    remember: Callable[[Callable[[], Tensor]], Tensor] = lambda make: make(),
) -> list[Call]:
    """Do the same with text sampled from the model; [] also where it cannot write any. Raises what the model raises.

    remember: returns what the function that writes the text returned, int64 [n], now or in a run before.
    """
    if share <= 0 or not can_generate(model):
        return []

    def written(*arguments: Any) -> Tensor:
        return remember(lambda: generated_tokens(model, *arguments, progress=progress))

    return _calls_of(model, calls, share, written, _GENERATED_HINT)


def _calls_of(model: nn.Module, calls: Sequence[Call], share: float, source: _Source, hint: str) -> list[Call]:
    tokens = _ordinary_tokens(model) if share > 0 else None
    if tokens is None:
        return []
    names = list(inspect.signature(model.forward).parameters)
    count = max(1, round(share * len(calls)))
    spaced = [calls[i * len(calls) // count] for i in range(count)]
    used = [(call, ids) for call in spaced if (ids := _ids_of(call, names))]
    if not used:
        return []
    sizes = [value.numel() for _, ids in used for value in ids.values()]
    longest = max(value.shape[1] for _, ids in used for value in ids.values())
    others = iter(source(tokens, sum(sizes), longest, torch.Generator().manual_seed(0))[: sum(sizes)].split(sizes))
    return [_rewritten(call, ids, names, tokens, others, hint) for call, ids in used]


def _ordinary_tokens(model: nn.Module) -> Tensor | None:
    """Return the ids of the vocabulary but for special ones: int64 [V]; None for a model without a vocabulary."""
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
    """Yield every number that a config, or a config within it, names as a token's."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(name).endswith(_SPECIAL):
            yield from (one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _ids_of(call: Call, names: Sequence[str]) -> dict[str, Tensor]:
    """Find the token ids [B, T] among a call's arguments, by name."""
    named = dict(zip(names, call.args, strict=False)) | call.kwargs
    return {name: value for name, value in named.items() if name.endswith(_IDS) and holds_ids(value)}


def holds_ids(value: Any) -> bool:
    """Tell whether a value is token ids [B, T]."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int32, torch.int64)


def _rewritten(
    call: Call, ids: Mapping[str, Tensor], names: Sequence[str], tokens: Tensor, others: Iterator[Tensor], hint: str
) -> Call:
    """Copy ``call`` with the next of ``others`` in place of its ordinary ids."""
    # what a model writes to, such as a key/value cache, must not be shared with the call it comes from
    copied = call.on_copies()
    args, kwargs = list(copied.args), copied.kwargs
    for name, value in ids.items():
        other = next(others).view(value.shape).to(value)
        keep = ~torch.isin(value, tokens.to(value))
        for mask in call.masks:
            if mask.shape == value.shape:
                keep |= mask == 0
        holder, key = (kwargs, name) if name in kwargs else (args, names.index(name))
        holder[key] = torch.where(keep, value, other)
    return Call(tuple(args), kwargs, hint)
