"""The rows of fused queries, keys and values, or of gate and up, that a Linear's input comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from awq_ext.folding.fold import LinearFold
from awq_ext.folding.tracing import find_rows
from awq_ext.forwards.probe import Probe


def fused(rows: int, channels: int, take: Callable[[Tensor], Tensor]) -> LinearFold | None:
    """The rows found for out(take(fused Linear)), as a fold."""
    producer, out = nn.Linear(16, rows), nn.Linear(channels, 16)
    x = torch.randn(4, 9, 16)

    @torch.no_grad()
    def run() -> Tensor:
        return out(take(producer(x)))

    probe = Probe(run, run())
    (seen,) = probe.inputs([out], {})
    found = find_rows(probe, out, seen, producer)
    return None if found is None else LinearFold(producer, found)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, tokens, heads, width] -> [batch, tokens, heads * width]; fewer heads of k and v are repeated."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    parts = (t.transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


HEADS, WIDTH = 4, 8
EVERY = torch.arange(3 * HEADS * WIDTH)
LAYOUTS: Mapping[str, tuple[int, Callable[[Tensor], Tensor], Tensor]] = {
    "q, k, v one after another": (
        96,
        lambda y: attend(*(t.unflatten(-1, (4, 8)) for t in y.chunk(3, -1))),
        EVERY[64:],
    ),
    "q, k, v of each head": (
        96,
        lambda y: attend(*y.unflatten(-1, (4, 3, 8)).unbind(-2)),
        EVERY.view(4, 3, 8)[:, 2].flatten(),
    ),
    "all q, one k, one v": (
        48,
        lambda y: attend(*y.unflatten(-1, (6, 8)).split((4, 1, 1), 2)),
        EVERY[40:48].repeat(4),
    ),
    "two q, one k, one v of each group": (
        64,
        lambda y: attend(*(t.flatten(2, 3) for t in y.unflatten(-1, (2, 4, 8)).split((2, 1, 1), 3))),
        EVERY[:64].view(2, 4, 8)[:, 3:].expand(-1, 2, -1).flatten(),
    ),
    "all q, two k, two v": (
        64,
        lambda y: attend(*y.unflatten(-1, (8, 8)).split((4, 2, 2), 2)),
        EVERY[48:64].view(2, 1, 8).expand(-1, 2, -1).flatten(),
    ),
    "narrow k and v of each head": (
        56,
        lambda y: attend(*(y.unflatten(-1, (4, 14))[..., part] for part in (slice(6), slice(6), slice(6, None)))),
        EVERY[:56].view(4, 14)[:, 6:].flatten(),
    ),
    "gate and up": (64, lambda y: nn.functional.silu(y[..., :32]) * y[..., 32:], EVERY[32:64]),
    "up and gate": (64, lambda y: nn.functional.gelu(y[..., 32:]) * y[..., :32], EVERY[:32]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_fused_layers_are_found(layout: str) -> None:
    rows, take, expected = LAYOUTS[layout]
    fold = fused(rows, HEADS * WIDTH, take)
    assert fold is not None
    assert torch.equal(fold.rows, expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_linear_that_does_not_reach_the_input_is_never_its_producer(seed: int) -> None:
    """One row makes the smallest claim: any power of two but 1 would do."""
    torch.manual_seed(seed)
    constant = torch.randn(4, 9, 32)
    assert fused(1, 32, lambda y: constant) is None
    assert fused(2, 32, lambda y: constant) is None
