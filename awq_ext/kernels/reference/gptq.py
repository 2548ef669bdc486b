"""Rounding with error feedback (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import quantize_weight
from .sizes import expand_groups


def gptq_factor(second_moment: Tensor, order: Tensor, damping: float = 1.0) -> Tensor:
    """Compute the R with which :func:`gptq_quantize` feeds errors back: upper triangular, fp32 [K, K].

    R R^T = H + damping * diag(H) + 1e-6 mean, where H is second_moment fp32 [K, K] with both axes reordered by ``order`` int64 [K],
    and mean that of H's diagonal. H must be finite (ValueError otherwise), but may be singular or have channels that no input
    enters: where rounding leaves the sum not positive definite, ten times as much is added.
    """
    if not torch.isfinite(second_moment).all():
        raise ValueError("gptq_factor: argument 'second_moment': expected finite numbers, got NaN or infinity")
    h = second_moment.double()[order][:, order]
    added = damping * h.diagonal().clamp_min(0) + 1e-6 * (float(h.diagonal().mean()) or 1.0)
    for more in range(30):
        # The factor of the flipped matrix (last channel first) is lower triangular; flipped back it is upper triangular.
        factor, failed = torch.linalg.cholesky_ex((h + (added * 10**more).diag()).flip(0, 1))
        if not failed:
            break
    return factor.flip(0, 1).float()


def gptq_quantize(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize with error feedback: channels are rounded in ``order``, each making up for the errors of those before it.

    GPTQ (arXiv 2210.17323), seen as the nearest plane algorithm (arXiv 2507.18553): with e the errors, the output error is the sum
    over channels j of (e_j R_jj + sum over i < j of e_i R_ij)^2, so channel j rounds w_j + (sum over i < j of e_i R_ij) / R_jj.
    factor: R fp32 [K, K] from :func:`gptq_factor` with the same order. Inputs divided by channel_scale s have the factor
    diag(1/s) R, so one R serves every s. Scales and zeros are those of :func:`quantize_weight` whatever the order, because groups
    stay contiguous.
    """
    if channel_scale is not None:
        factor = factor / channel_scale[order][:, None]
    parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, channel_scale, clip)
    k = weight.shape[1]
    w = weight.float() if channel_scale is None else weight.float() * channel_scale
    w, step, zero = (
        t[:, order] for t in (w, *(expand_groups(part.float(), k, group_size) for part in (parts[1], parts[2])))
    )
    error, codes = torch.zeros_like(w), torch.zeros_like(w)
    with torch.autocast(weight.device.type, enabled=False):
        for j in range(k):
            target = w[:, j] + error[:, :j] @ factor[:j, j] / factor[j, j]
            codes[:, j] = (torch.round(target / step[:, j]) + zero[:, j]).clamp(0, 2**bits - 1)
            error[:, j] = w[:, j] - (codes[:, j] - zero[:, j]) * step[:, j]
    return codes[:, order.argsort()].to(torch.uint8), parts[1], parts[2]
