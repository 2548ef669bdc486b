"""What a model predicts at each position, kept for its likeliest tokens, and how far other logits are from that.

A vocabulary has 50,000 to 250,000 tokens, and the logits of one window would take up to 500 MB. The likeliest tokens hold nearly
all of the probability; the others are kept as one, with what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens kept at a position: a window of 512 takes 2 MiB.
LIKELIEST = 512
BYTES = LIKELIEST * 8  # of a position
_ROWS_AT_ONCE = 64
_LEAST = 1e-12  # of what is left for the other tokens: a smaller share is rounding


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions at P positions of a window, numbered as its logits [..., V] are when all leading dimensions are joined.

    positions int64 [P]; tokens int32 and logs (log-probabilities) fp32 [P, k].
    """

    positions: Tensor
    tokens: Tensor
    logs: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor, mask: Tensor | None) -> Predictions:
        """Keep the likeliest tokens of ``logits`` [..., V], at the positions that ``mask`` [...] counts (None: all)."""
        flat = logits.detach().reshape(-1, logits.shape[-1])
        positions = torch.arange(len(flat)) if mask is None else mask.reshape(-1).cpu().nonzero()[:, 0]
        count = min(LIKELIEST, flat.shape[1])
        tokens = torch.empty(len(positions), count, dtype=torch.int32)
        logs = torch.empty(len(positions), count)
        for rows in torch.arange(len(positions)).split(_ROWS_AT_ONCE):
            found = flat[positions[rows].to(flat.device)].float().log_softmax(-1).topk(count)
            tokens[rows], logs[rows] = found.indices.int().cpu(), found.values.cpu()
        return cls(positions, tokens, logs)

    @property
    def usable(self) -> bool:
        """Whether all are numbers."""
        return bool(self.logs.isfinite().all())


def divergence(logits: Tensor, predictions: Predictions) -> tuple[float, Tensor]:
    """Sum the KL divergences of ``logits`` [..., V] from the predictions, in nats; also return the gradient of the sum.

    The gradient is like ``logits``, in their dtype. The tokens that were not kept count as one: what they have together is
    compared. So the sum is at most the divergence over the whole vocabulary, and the same where ``logits`` agree with the float
    model on how these tokens share what is left.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])
    gradient = torch.zeros_like(flat)
    total = 0.0
    for rows in torch.arange(len(predictions.positions)).split(_ROWS_AT_ONCE):
        at = predictions.positions[rows].to(flat.device)
        tokens, logs = predictions.tokens[rows].long().to(flat.device), predictions.logs[rows].to(flat.device)
        found = flat[at].float().log_softmax(-1)
        ours, kept = found.gather(1, tokens), logs.exp()
        chances = found.exp_()
        # the rest, of both; 0 where the whole vocabulary was kept
        left, mine = ((1 - x.sum(1, keepdim=True)).clamp_min(_LEAST) for x in (kept, ours.exp()))
        ratio = left / mine if tokens.shape[1] < flat.shape[1] else torch.ones_like(left)
        total += float((kept * (logs - ours)).sum() + (left * ratio.log()).sum())
        # derivative of -sum of p log q: q - p for a token kept, and the others share the difference as they share q
        chances *= 1 - ratio
        gradient[at] = chances.scatter(1, tokens, ours.exp() - kept).to(gradient.dtype)
    return total, gradient.view(logits.shape)
