"""Statistics, searches, error feedback and descent on the emulated GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from checks import moment
from torch import Tensor

from awq_ext.kernels import cuda, reference

EPS = 2.0**-24  # relative error of one fp32 operation
SHAPES = [(1, 1, -1), (7, 13, 7), (3, 100, 32), (33, 64, 16), (9, 70, -1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics(dtype: torch.dtype, masked: bool, weighted: bool) -> None:
    ours, expected = cuda.ActivationStats(13), reference.ActivationStats(13)
    size = torch.zeros(13, dtype=torch.float64)
    for rows in (1, 70, 130):
        x = torch.randn(rows, 2, 13).to(dtype)[:, 1]
        mask = torch.rand(rows) < 0.7 if masked else None
        if masked and rows > 1:
            x[~mask] = float("nan")  # padding may hold anything
        weights = torch.rand(rows) if weighted else None
        for stats in (ours, expected):
            stats.update(x, mask, weights)
        size += x.double().nan_to_num().abs().sum(0)
    assert ours.rows == expected.rows
    # both add doubles, in another order; sqrt(w) is rounded to fp32, by torch not always to the nearest
    torch.testing.assert_close(ours.sum(), expected.sum(), rtol=0, atol=1e-13 * float(size.max()))
    torch.testing.assert_close(ours.abs_sum(), expected.abs_sum(), rtol=2 * EPS if weighted else 1e-13, atol=0)
    norm = expected.second_moment().diagonal().sqrt()
    # sums of 201 fp32 products in another order, by Cauchy-Schwarz within so many eps of the norms
    assert ((ours.second_moment() - expected.second_moment()).abs() <= 2 * 205 * EPS * norm[:, None] * norm).all()


def test_statistics_refuse_wrong_weights() -> None:
    stats = cuda.ActivationStats(4)
    for weights, error in (
        (torch.tensor([1.0, -1]), ValueError),
        (torch.ones(3), ValueError),
        (torch.ones(2).half(), TypeError),
    ):
        with pytest.raises(error, match="'weights'"):
            stats.update(torch.ones(2, 4), weights=weights)
    with pytest.raises(ValueError, match="'mask': expected 2 elements"):
        stats.update(torch.ones(2, 4), torch.ones(3, dtype=torch.bool))
    assert stats.rows == 0
    stats.update(torch.ones(2, 4), torch.tensor([True, False]), torch.tensor([1.0, -1]))  # a row that does not count
    assert stats.rows == 1


def slack(error: Tensor, second_moment: Tensor) -> Tensor:
    """How far e G e^T may be off on either side: K + 3 eps of the sum of magnitudes."""
    size = ((error.double().abs() @ second_moment.double().abs()) * error.double().abs()).sum(1)
    return 2 * (error.shape[1] + 3) * EPS * size


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_losses(n: int, k: int, group_size: int) -> None:
    weight, second_moment = torch.randn(n, k).bfloat16(), moment(k)
    s, divisor = torch.rand(k) + 0.5, torch.rand(n) + 0.5
    parts = reference.quantize_weight(weight, group_size, channel_scale=s)
    error = torch.randn(n, k)
    off = (cuda.quadratic_loss(error, second_moment) - reference.quadratic_loss(error, second_moment)).abs()
    assert (off <= slack(error, second_moment)).all()
    error = reference.dequantize_weight(*parts, group_size) / s * divisor[:, None] - weight
    for codes in (parts[0], reference.pack_int4(parts[0])):
        args = (weight, codes, *parts[1:], second_moment, group_size, s, divisor, 0.5)
        for ours, expected in zip(cuda.code_losses(*args), reference.code_losses(*args), strict=True):
            assert ((ours - expected).abs() <= 2 * slack(error, second_moment)).all()


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_scale_losses(n: int, k: int, group_size: int) -> None:
    weight, second_moment, candidates = torch.randn(n, k), moment(k), torch.rand(3, k) + 0.5
    for max_rows, symmetric in ((0, False), (5, True)):
        args = (weight, candidates, second_moment, group_size, 4, symmetric, torch.bfloat16, max_rows)
        expected = reference.scale_losses(*args)
        off = torch.stack([slack(weight.abs(), second_moment).sum()] * 3)  # errors are below their weights
        assert ((cuda.scale_losses(*args) - expected).abs() <= off).all()


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_search_clip(n: int, k: int, group_size: int) -> None:
    """The chosen range loses no more than the reference's, up to fp32 sums."""
    weight, second_moment, ratios = torch.randn(n, k), moment(k), torch.tensor([1.0, 0.9, 0.8, 0.65, 0.5])
    s, g = torch.rand(k) + 0.5, reference.group_length(k, group_size)
    args = (weight, second_moment, ratios, group_size, 4, False, torch.float16, s)
    ours, expected = cuda.search_clip(*args), reference.search_clip(*args)
    losses = []
    for clip in (ours, expected):
        parts = reference.quantize_weight(weight, group_size, channel_scale=s, clip=clip)
        error = reference.dequantize_weight(*parts, group_size) / s - weight
        blocks = [(error[:, a : a + g], second_moment[a : a + g, a : a + g]) for a in range(0, k, g)]
        losses.append(torch.stack([reference.quadratic_loss(*block) for block in blocks], 1))
    most = torch.stack([slack(*block) for block in blocks], 1)
    assert (losses[0] <= losses[1] + 2 * most).all()
    assert (ours == expected).float().mean() > 0.9
    assert set(ours.unique().tolist()) <= set(ratios.tolist())


@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (5, 300, 128)])
def test_error_feedback(n: int, k: int, group_size: int) -> None:
    """Every code is the nearest to its weight and what the errors before it ask for, in exact arithmetic."""
    weight, second_moment = torch.randn(n, k), moment(k)
    for act_order, scaled in ((False, False), (True, True)):
        order = second_moment.diagonal().argsort(descending=True) if act_order else torch.arange(k)
        s = torch.rand(k) + 0.5 if scaled else None
        factor = cuda.gptq_factor(second_moment, order)
        ours = cuda.gptq_quantize(weight, factor, order, group_size, channel_scale=s)
        expected = reference.quantize_weight(weight, group_size, channel_scale=s)
        assert torch.equal(ours[1], expected[1])
        assert torch.equal(ours[2], expected[2])
        w = weight if s is None else weight * s
        r = factor if s is None else factor / s[order][:, None]
        assert_decisions(ours, w, r, order, group_size)


def assert_decisions(parts: tuple[Tensor, ...], weight: Tensor, factor: Tensor, order: Tensor, group_size: int) -> None:
    """Where the exact quotient is as near to the middle of two codes as fp32 sums may be off, either is right."""
    k = weight.shape[1]
    step, zero = (reference.expand_groups(p.float(), k, group_size).double()[:, order] for p in (parts[1], parts[2]))
    codes, w, r = parts[0].double()[:, order], weight.double()[:, order], factor.double()
    error, above = w - (codes - zero) * step, r.triu(1)
    target = w + error @ above / r.diagonal()
    # sums of up to K products, in the kernel of changes that are rounded once more: 2 K + 8 eps of the magnitudes
    off = EPS * (2 * k + 8) * (error.abs() @ above.abs()) / r.diagonal() + EPS * 4 * (target.abs() + w.abs())
    quotient, off = target / step, off / step
    lowest, highest = ((q.round() + zero).clamp(0, 15) for q in (quotient - off, quotient + off))
    assert ((codes >= lowest) & (codes <= highest)).all()


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("scales_only", [False, True])
def test_descent(n: int, k: int, group_size: int, scales_only: bool) -> None:
    weight, second_moment = torch.randn(n, k), moment(k)
    s = torch.rand(k) + 0.5
    parts = reference.quantize_weight(weight, group_size, channel_scale=s)
    before = tuple(part.clone() for part in parts)
    h = reference.refine.damped_moment(second_moment, s, 1.0)

    def loss(refined: tuple[Tensor, ...]) -> Tensor:
        return reference.quadratic_loss(weight * s - reference.dequantize_weight(*refined, group_size), h)

    args = (weight, *parts, second_moment, group_size, 4, 1.0)
    for rounds in (0, 1, 2):
        ours, expected = (
            f.refine_quantized(*args, rounds, channel_scale=s, scales_only=scales_only) for f in (cuda, reference)
        )
        assert torch.equal(ours[2], parts[2])
        if rounds == 0 or scales_only:
            assert torch.equal(ours[0], parts[0])
        # a step or a code may fall the other way where two are as good; then those after it differ a little
        assert (loss(ours) - loss(expected)).abs().max() <= 0.02 * loss(parts).max()
        assert loss(ours).sum() <= 1.001 * loss(expected).sum() + 1e-6
        if rounds == 1:
            assert (ours[0] == expected[0]).float().mean() > 0.99
            assert (ours[1] == expected[1]).float().mean() > 0.97
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_the_order_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second_moment, order = torch.randn(9, 70), moment(70), torch.arange(70)
    factor, results = reference.gptq_factor(second_moment, order), []
    for way in ("ascending", "descending"):
        monkeypatch.setenv("AWQ_EMULATED_ORDER", way)
        parts = cuda.gptq_quantize(weight, factor, order, 32)
        results.append((*parts, *cuda.refine_quantized(weight, *parts, second_moment, 32)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
