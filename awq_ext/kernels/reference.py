"""Every kernel again in plain torch: the executable specification, the test oracle, and what runs where no C++ kernel does.

The functions here and those of the compiled ``awq_ext._C`` have the same names, arguments and results, so a caller holds
one or the other (see ``backend.py``). Symbols: N = out_features, K = in_features, g = group length along K,
G = ceil(K / g) groups a row (the last may be short). ``group_size = -1`` means one group a row.

Sources: AWQ, arXiv 2306.00978, section 3.2 (scales, clip); the quantizer is the usual group-wise affine one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 2048  # of a weight, so that little memory is needed
# The smallest positive number each storage type of a scale can hold, and the largest: a scale is kept inside.
SCALE_RANGE = {
    torch.float16: (2.0**-24, 65504.0),
    torch.bfloat16: (2.0**-126, torch.finfo(torch.bfloat16).max),
}


def group_length(in_features: int, group_size: int) -> int:
    """Channels in a full group: ``group_size``, or the whole row for -1 or a row shorter than a group."""
    return in_features if group_size == -1 else min(group_size, in_features)


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row, the short last one included."""
    return -(-in_features // group_length(in_features, group_size))


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """[..., G] -> [..., K]: every channel gets its group's value."""
    return values.repeat_interleave(group_length(in_features, group_size), dim=-1)[..., :in_features]


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g], a short last group filled with zeros (a zero never widens a range that includes 0)."""
    g = group_length(weight.shape[1], group_size)
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % g)).view(weight.shape[0], -1, g)


def quantize_weight(
    weight: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of a weight, group by group: ``w ~ (code - zero) * scale``.

    weight [N, K] fp32/bf16/fp16; channel_scale [K] fp32 multiplies the columns first (in fp32); clip [N, G] fp32 in
    (0, 1] shrinks the range of each group. Returns codes uint8 [N, K], scales ``scale_dtype`` [N, G], zeros uint8 [N, G].

    asymmetric: lo = clip*min(0, min w), hi = clip*max(0, max w), scale = (hi - lo) / (2^bits - 1),
    zero = clamp(round(-lo / scale)); symmetric: scale = clip*max|w| / (2^bits - 1) * 2, zero = 2^(bits - 1).
    The scale is rounded to its storage type *before* codes are computed, so what is searched is what runs; rounding is
    half to even. A group whose weights are all equal is stored exactly (up to the storage type): scale = |w|, code = zero +- 1.
    """
    w = weight.float()
    if channel_scale is not None:
        w = w * channel_scale
    top = 2**bits - 1
    grouped = _grouped(w, group_size)
    ratio = torch.ones_like(grouped[..., 0]) if clip is None else clip
    lo = grouped.amin(-1).clamp(max=0) * ratio
    hi = grouped.amax(-1).clamp(min=0) * ratio
    smallest, largest = SCALE_RANGE[scale_dtype]
    step = torch.maximum(-lo, hi) * 2 / top if symmetric else (hi - lo) / top
    # min == max over the real (unpadded) channels; a padded group is compared against its own first channel
    first = grouped[..., :1]
    inside = expand_groups(torch.arange(grouped.shape[1], device=w.device), w.shape[1], group_size)
    constant = torch.ones_like(lo, dtype=torch.bool)
    differs = w != first[..., 0].gather(1, inside.expand(w.shape[0], -1))
    constant = ~torch.zeros_like(lo).index_add_(1, inside, differs.float()).bool() & (first[..., 0] != 0)
    step = torch.where(constant, first[..., 0].abs(), step).clamp(smallest, largest)
    scales = step.to(scale_dtype)
    step = scales.float()
    if symmetric:
        zeros = torch.full_like(step, 2.0 ** (bits - 1))
    else:
        zeros = torch.where(constant, (first[..., 0] < 0).float(), torch.round(-lo / step)).clamp(0, top)
    per_channel = lambda v: expand_groups(v, w.shape[1], group_size)  # noqa: E731
    codes = (torch.round(w / per_channel(step)) + per_channel(zeros)).clamp(0, top)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(code - zero) * scale in fp32: [N, K]."""
    k = codes.shape[1]
    return (codes.float() - expand_groups(zeros.float(), k, group_size)) * expand_groups(scales.float(), k, group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """uint8 [N, K] codes below 16 -> uint8 [N, ceil(K / 2)]: even channel in the low nibble, odd in the high one, padded with 0."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of pack_int4: uint8 [N, ceil(K / 2)] -> uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :in_features].contiguous()


def quadratic_loss(error: Tensor, second_moment: Tensor) -> Tensor:
    """e G e^T of every row: error fp32 [N, K], second_moment fp32 [K, K] symmetric -> fp64 [N].

    With G = X^T X this is the squared output error summed over the calibration rows (algorithm: objective from second moments).
    """
    # autocast would round both factors of a product to 16 bits
    with torch.autocast(error.device.type, enabled=False):
        return ((error @ second_moment).double() * error.double()).sum(1)


def code_losses(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
    damping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Squared output errors of the rows of a quantized weight, and those with G's diagonal raised: fp64 [N] each.

    With e = (code - zero) * scale / channel_scale * divisor - weight: e G e^T, or 0 where rounding makes that negative; and to it
    damping * sum of e_k^2 G_kk. weight [N, K]; codes uint8 [N, K], or packed [N, ceil(K/2)] as by :func:`pack_int4`; channel_scale
    fp32 [K] and divisor fp32 [N]: what columns were multiplied and rows divided by before rounding.
    """
    k, plain, own = weight.shape[1], [], []
    diagonal = second_moment.diagonal().double()
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        unpacked = codes[rows] if codes.shape[1] == k else unpack_int4(codes[rows], k)
        error = dequantize_weight(unpacked, scales[rows], zeros[rows], group_size)
        if channel_scale is not None:
            error /= channel_scale
        if divisor is not None:
            error *= divisor[rows, None]
        error -= weight[rows]
        plain.append(quadratic_loss(error, second_moment).clamp_min_(0))
        if damping:
            own.append(error.double().square_() @ diagonal)
    total = torch.cat(plain) if plain else diagonal.new_zeros(0)
    return total, total + damping * torch.cat(own) if own else total


def scale_losses(
    weight: Tensor,
    candidates: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    max_rows: int = 0,
) -> Tensor:
    """Output error of a Linear for each candidate of its input scale: ||(Q(W diag s) diag(1/s) - W) X^T||^2.

    weight [N, K]; candidates fp32 [C, K], all > 0; second_moment fp32 [K, K] = X^T X. Returns fp64 [C].
    max_rows > 0 evaluates that many evenly spaced rows (n = floor(i * N / max_rows)) instead of all N.
    """
    if 0 < max_rows < weight.shape[0]:
        weight = weight[torch.arange(max_rows, device=weight.device) * weight.shape[0] // max_rows]
    losses = []
    for s in candidates:
        parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, channel_scale=s)
        error = dequantize_weight(*parts, group_size) / s - weight.float()
        losses.append(quadratic_loss(error, second_moment).sum())
    return torch.stack(losses)


def search_clip(
    weight: Tensor,
    second_moment: Tensor,
    ratios: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """The range ratio of each group with the least e_g G_gg e_g^T, e_g the error in the group: fp32 [N, G].

    G_gg is the diagonal block of second_moment that belongs to the group. Errors are taken in the original space: (Q(W diag s)
    diag(1/s) - W). ratios fp32 [R], tried in order; the first of equal losses wins, so put 1.0 first.
    """
    n, k = weight.shape
    g = group_length(k, group_size)
    s = torch.ones(k, device=weight.device) if channel_scale is None else channel_scale
    best = torch.full((n, group_count(k, group_size)), float("inf"), dtype=torch.float64, device=weight.device)
    chosen = torch.ones_like(best, dtype=torch.float32)
    for ratio in ratios.tolist():
        clip = torch.full_like(chosen, ratio)
        parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, s, clip)
        error = dequantize_weight(*parts, group_size) / s - weight.float()
        loss = torch.stack(
            [quadratic_loss(error[:, a : a + g], second_moment[a : a + g, a : a + g]) for a in range(0, k, g)], dim=1
        )
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, clip, chosen)
    return chosen


def gptq_factor(second_moment: Tensor, order: Tensor, damping: float = 1.0) -> Tensor:
    """R, upper triangular, that :func:`gptq_quantize` feeds errors on with: fp32 [K, K], R R^T = H + damping * diag(H) + 1e-6 mean.

    H: second_moment fp32 [K, K], both axes reordered by ``order`` int64 [K]; the mean is that of H's diagonal. It must be finite
    (ValueError otherwise); singular ones and channels that nothing ever entered are fine: where rounding leaves the sum not
    positive definite, ten times as much is added.
    """
    if not torch.isfinite(second_moment).all():
        raise ValueError("gptq_factor: argument 'second_moment': expected finite numbers, got NaN or infinity")
    h = second_moment.double()[order][:, order]
    added = damping * h.diagonal().clamp_min(0) + 1e-6 * (float(h.diagonal().mean()) or 1.0)
    for more in range(30):
        # The last channel first: the factor of the flipped matrix, flipped back, is upper triangular.
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
    """:func:`quantize_weight` with error feedback: channels are rounded in ``order``, each making up for those before it.

    GPTQ (arXiv 2210.17323) as nearest plane (arXiv 2507.18553): with e the errors so far, the output error is the sum over
    channels j of (e_j R_jj + sum over i < j of e_i R_ij)^2, so channel j is rounded at w_j + (sum over i < j of e_i R_ij) / R_jj.
    factor R fp32 [K, K] from :func:`gptq_factor` with the same order; inputs divided by channel_scale s have diag(1/s) R for their
    factor, so one serves every s. Scales and zeros are those of quantize_weight, whatever the order: groups stay contiguous.
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


def refine_quantized(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    damping: float = 1.0,
    rounds: int = 1,
    channel_scale: Tensor | None = None,
    scales_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales that lower e H e^T of every row further, e = weight * s - value, by coordinate descent.

    Takes what :func:`quantize_weight` or :func:`gptq_quantize` returned for the same weight [N, K] and channel_scale s [K];
    H = diag(1/s) second_moment diag(1/s) + damping * its diagonal. In each round every group's scale, then (unless
    ``scales_only``) every channel's code, is set to its best value with all others as they stand; scales are rounded to their
    storage type and kept where the best is not within a factor of 2. Zeros stay. Channels that nothing ever entered keep the
    nearest code.
    """
    k, g, top = weight.shape[1], group_length(weight.shape[1], group_size), 2**bits - 1
    w = weight.float() if channel_scale is None else weight.float() * channel_scale
    s = torch.ones(k, device=w.device) if channel_scale is None else channel_scale
    h = second_moment / (s[:, None] * s)
    own = h.diagonal()
    # so little for a channel that nothing entered that the scale of its group goes by the others
    unseen = 1e-6 * float(own.double().mean()) or 1.0
    own.copy_(torch.where(own > 0, own * (1 + damping), unseen))
    steps, offsets, codes = scales.float(), zeros.float(), codes.float()
    largest = SCALE_RANGE[scales.dtype][1]
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(rounds):
            level = codes - expand_groups(offsets, k, group_size)
            error = w - level * expand_groups(steps, k, group_size)
            for i, part in enumerate(slice(a, min(a + g, k)) for a in range(0, k, g)):
                along = (level[:, part] * (error @ h[:, part])).sum(1)
                size = (level[:, part] * (level[:, part] @ h[part, part])).sum(1)
                best = (steps[:, i] + along / size).to(scales.dtype).float()
                fits = (best > 0.5 * steps[:, i]) & (best < 2 * steps[:, i]) & (best <= largest)
                steps[:, i] = torch.where(fits, best, steps[:, i])
                error[:, part] = w[:, part] - level[:, part] * steps[:, i, None]
            for j in range(0 if scales_only else k):
                step, zero = steps[:, j // g], offsets[:, j // g]
                target = w[:, j] + (error @ h[:, j] - error[:, j] * h[j, j]) / h[j, j]
                codes[:, j] = (torch.round(target / step) + zero).clamp(0, top)
                error[:, j] = w[:, j] - (codes[:, j] - zero) * step
    return codes.to(torch.uint8), steps.to(scales.dtype), zeros


TILE_OUTPUTS, STEP_CHANNELS = 32, 4  # of the compute layout, csrc/base/layout.h


def step_count(in_features: int, group_size: int) -> int:
    """Steps of four channels in a row, every group beginning with a new one."""
    g = group_length(in_features, group_size)
    return in_features // g * -(-g // STEP_CHANNELS) + -(-(in_features % g) // STEP_CHANNELS)


def _tiled_rows(values: Tensor) -> Tensor:
    """[N, ...] -> [T, 32, ...], filled with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, -len(values) % TILE_OUTPUTS))
    return padded.view(-1, TILE_OUTPUTS, *values.shape[1:])


def tile_int4(packed: Tensor, in_features: int, group_size: int) -> Tensor:
    """Packed rows uint8 [N, ceil(K/2)] -> uint8 [T, S, 64]: tiles of 32 outputs, steps of 4 channels.

    Byte 4j + 2r + q of a step holds channel 2q + r of outputs j (low nibble) and 16 + j (high) of its tile.
    """
    steps = step_count(in_features, group_size)
    grouped = _grouped(unpack_int4(packed, in_features), group_size)
    codes = torch.nn.functional.pad(grouped, (0, -grouped.shape[2] % STEP_CHANNELS)).flatten(1)
    tiles = _tiled_rows(codes[:, : steps * STEP_CHANNELS])
    low, high = tiles.view(-1, 2, 16, steps, 2, 2).permute(1, 0, 3, 2, 5, 4)  # v, [t, s, j, r, q]
    return (low | high << 4).reshape(-1, steps, 64)


def untile_int4(tiles: Tensor, out_features: int, in_features: int, group_size: int) -> Tensor:
    """Inverse of tile_int4."""
    g, steps = group_length(in_features, group_size), tiles.shape[1]
    bytes_ = tiles.view(-1, steps, 16, 2, 2)
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), dim=1).permute(0, 1, 3, 2, 5, 4)  # t, v, j, s, q, r
    rows = codes.reshape(-1, steps * STEP_CHANNELS)[:out_features]
    step = torch.arange(in_features, device=tiles.device)
    place = step // g * -(-g // STEP_CHANNELS) * STEP_CHANNELS + step % g
    return pack_int4(rows[:, place])


def tile_scales(scales: Tensor) -> Tensor:
    """[N, G] -> [T, G, 32]."""
    return _tiled_rows(scales).transpose(1, 2).contiguous()


def untile_scales(tiles: Tensor, out_features: int) -> Tensor:
    """Inverse of tile_scales."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:out_features].contiguous()


def tile_zeros(zeros: Tensor) -> Tensor:
    """uint8 [N, G], all below 16 -> uint8 [T, G, 16]: byte j holds output j (low nibble) and 16 + j of the tile."""
    low, high = tile_scales(zeros).chunk(2, dim=2)
    return low | high << 4


def untile_zeros(tiles: Tensor, out_features: int) -> Tensor:
    """Inverse of tile_zeros."""
    return untile_scales(torch.cat((tiles & 15, tiles >> 4), dim=2), out_features)


def int4_weight(
    tiles: Tensor, scales: Tensor, zeros: Tensor, in_features: int, out_features: int, group_size: int
) -> Tensor:
    """(code - zero) * scale of a tiled weight, in fp32: [N, K]."""
    codes = unpack_int4(untile_int4(tiles, out_features, in_features, group_size), in_features)
    groups = untile_scales(scales, out_features), untile_zeros(zeros, out_features)
    return dequantize_weight(codes, *groups, group_size)


RUN_CHANNELS = 256  # the most that one scale of int8 activations covers


def int8_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x fp32 [..., K] as x ~ q * scale: int8 [..., K] and fp32 [..., K], each run of channels with one scale.

    A run is a group, or up to 256 channels of a longer one. scale = max |x| / 127 (at least 2^-126), q = round(x / scale),
    half to even. Where x is not finite neither is the run's scale, and q is 0.
    """
    k = x.shape[-1]
    run = torch.arange(k, device=x.device)
    g = group_length(k, group_size)
    run = run // g * -(-g // RUN_CHANNELS) + run % g // RUN_CHANNELS
    largest = torch.zeros((*x.shape[:-1], int(run[-1]) + 1), device=x.device)
    largest = largest.scatter_reduce(-1, run.expand_as(x), x.abs(), "amax")
    scale = (largest / 127).clamp(min=2.0**-126)[..., run]
    q = torch.where(scale.isfinite(), torch.round(x * (1 / scale)), 0)
    return q.to(torch.int8), scale


def int4_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    compute_dtype: str = "auto",
) -> Tensor:
    """x [..., K] @ W^T + bias with W int4: tiles uint8 [T, S, 64], scales [T, G, 32], zeros uint8 [T, G, 16] -> [..., N].

    pre_quant_scale fp32 [K] multiplies x first (1/s where the scale could not be folded). compute_dtype "int8" rounds x
    to ``int8_activations`` then. Computed in fp32, returned in x's dtype.
    """
    x32 = x.float() if pre_quant_scale is None else x.float() * pre_quant_scale
    if compute_dtype == "int8":
        q, scale = int8_activations(x32, group_size)
        x32 = q * scale
    weight = int4_weight(tiles, scales, zeros, in_features, out_features, group_size)
    return torch.nn.functional.linear(x32, weight, None if bias is None else bias.float()).to(x.dtype)


class ActivationStats:
    """Streaming statistics of the rows that enter a Linear: sums of x and |x|, X^T X, row count.

    sum, abs_sum fp64 [K]; second_moment fp32 [K, K], un-normalized; rows int. Rows where ``mask`` is False do not count. With
    weights w: sums of w x, sqrt(w) |x| and w x x^T, all divided by the mean weight when they are read (rows stay a count).
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.rows = 0
        self._total = 0.0  # weight of all rows
        self._weighted = False
        self._applied = 1.0  # the share in _second_moment
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._second_moment = torch.zeros(in_features, in_features, device=device)

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K] (fp32/bf16/fp16, any strides); mask bool with one element a row.

        weights fp32, one a row, >= 0, by which the rows count; None: all 1. Rows are multiplied by sqrt(w) in fp32.
        """
        flat = x.detach().reshape(-1, self.in_features)
        if weights is not None:
            weights = _one_a_row(weights, len(flat)).to(flat.device)
        if mask is not None:
            kept = mask.reshape(-1).to(flat.device)
            flat, weights = flat[kept], None if weights is None else weights[kept]
        if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("ActivationStats.update: argument 'weights': expected finite numbers from 0")
        flat = flat.float()
        self._set_applied(1.0)
        with torch.autocast(flat.device.type, enabled=False):
            if weights is None:
                self._sum += flat.double().sum(0)
            else:
                self._sum += weights.double() @ flat.double()
                flat = flat * weights.sqrt()[:, None]
            self._abs_sum += flat.double().abs().sum(0)
            self._second_moment += flat.T @ flat
        self.rows += flat.shape[0]
        self._total += len(flat) if weights is None else float(weights.double().sum())
        self._weighted |= weights is not None

    @property
    def _share(self) -> float:
        return self.rows / self._total if self._weighted and self._total > 0 else 1.0

    def _set_applied(self, share: float) -> None:
        """Multiply the second moment in its place: it is the largest thing here."""
        if share != self._applied:
            self._second_moment *= share / self._applied
            self._applied = share

    def sum(self) -> Tensor:
        """Sum over rows of w x: fp64 [K]."""
        return self._sum * self._share if self._weighted else self._sum

    def abs_sum(self) -> Tensor:
        """Sum over rows of sqrt(w) |x|: fp64 [K]."""
        return self._abs_sum * self._share**0.5 if self._weighted else self._abs_sum

    def second_moment(self) -> Tensor:
        """Sum over rows of w x x^T, full and symmetric: fp32 [K, K]."""
        self._set_applied(self._share)
        return self._second_moment


def _one_a_row(weights: Tensor, rows: int) -> Tensor:
    if weights.dtype != torch.float32:
        raise TypeError(f"ActivationStats.update: argument 'weights': expected float32, got {weights.dtype}")
    if weights.numel() != rows:
        raise ValueError(
            f"ActivationStats.update: argument 'weights': expected {rows} elements, one a row, got {weights.numel()}"
        )
    return weights.detach().reshape(-1)
