"""Text sampled from a language model itself, so that calibration sees more of what it was trained on than it is given.

Each segment starts from one token drawn evenly from the vocabulary and goes on as the model samples it (LLM-QAT, arXiv 2305.17888,
section 2.1, makes training data so): other topics, code and languages than the calibration text's, as often as the model knows
them (docs/research.md: "Random tokens and the model's own text beside the calibration text").
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..modules import output_embeddings
from ..undo import interrupt

# Tokens of a segment. Each costs a forward of its own, whatever the number of segments; shorter ones are less like text.
SEGMENT = 128
# Segments written at a time: their keys and values are held meanwhile.
_AT_ONCE = 32


def can_generate(model: nn.Module) -> bool:
    """Tell whether ``model`` is a decoder with a head that can be called as those of transformers are, token after token."""
    if output_embeddings(model) is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return {"input_ids", "past_key_values", "use_cache"} <= inspect.signature(model.forward).parameters.keys()


@torch.no_grad()
def generated_tokens(
    model: nn.Module, tokens: Tensor, count: int, longest: int, generator: torch.Generator, progress: bool = False
) -> Tensor:
    """Sample at least ``count`` tokens, all among ``tokens``, in segments of at most ``longest``, one after another.

    tokens int64 [V]; returns int64 [n]. Raises ValueError for logits that are no numbers, and whatever the model raises.
    """
    length = min(longest, SEGMENT)
    starts = torch.randint(len(tokens), (-(-count // length),), generator=generator).split(_AT_ONCE)
    with tqdm(total=len(starts) * length, desc="writing text", unit="token", leave=False, disable=not progress) as bar:
        written = [_written(model, tokens, first, length, generator, bar) for first in starts]
    return tokens[torch.cat(written).flatten()]


def _written(
    model: nn.Module, tokens: Tensor, first: Tensor, length: int, generator: torch.Generator, bar: tqdm
) -> Tensor:
    """Sample segments that start with ``first`` [n], as places in ``tokens``: int64 [n, length]."""
    device = next(model.parameters()).device
    chosen, cache = [first], None
    bar.update()
    while len(chosen) < length:
        interrupt.check()
        ids = tokens[chosen[-1]].to(device)[:, None]
        output: Any = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if cache is None:
            raise ValueError("it returns no past_key_values")
        chosen.append(_sampled(output.logits[:, -1].float().cpu()[:, tokens], generator))
        bar.update()
    return torch.stack(chosen, 1)


def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a place from the softmax of each row of logits fp32 [n, V], by its inverse distribution function: int64 [n]."""
    below = logits.softmax(-1).cumsum(-1)
    if not below[:, -1].isfinite().all():
        raise ValueError("its logits are NaN or Inf")
    # right=True, and a point below the last sum: nothing of probability 0 is drawn, however the sums were rounded
    point = torch.rand(len(logits), 1, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, point, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
