"""Scale candidates, the search over them, clips and the loss: against the formulas and against activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_ext import AwqConfig, kernels
from awq_ext.kernels import reference
from awq_ext.solving.codes import CLIP_RATIOS, round_to_nearest, row_losses, search_clip, spread_rows
from awq_ext.solving.scales import candidate_scales, search_scale, weight_mean

CONFIGS = pytest.mark.parametrize(
    "config",
    [
        AwqConfig(group_size=16),
        AwqConfig(group_size=32, symmetric=True, scale_dtype="bfloat16"),
        AwqConfig(group_size=-1, search_rows=64),
        AwqConfig(group_size=64, bits=3, packed=False),
    ],
    ids=["g16", "g32-sym", "row", "3bit"],
)


def activations(k: int, rows: int = 200, seed: int = 0) -> Tensor:
    """Rows with correlated channels of very different size, some of them 30 times the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k, generator=generator) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator))
    return mixed * torch.where(torch.rand(k, generator=generator) < 0.1, 30.0, 1.0)


def test_weight_mean_is_the_formula() -> None:
    weights = [torch.randn(5, 40), torch.randn(3000, 40)]
    weights[0][2, 16:32] = 0
    expected = torch.zeros(40, dtype=torch.float64)
    for weight in weights:
        for row in weight.double():
            for start in range(0, 40, 16):
                part = row[start : start + 16].abs()
                if part.max() > 0:
                    expected[start : start + 16] += part / part.max()
    # one fp32 division a term: relative 2^-24, the sum is fp64, the result rounded once more: 2^-23 in all
    found = weight_mean(weights, [16] * len(weights))
    assert found.dtype == torch.float32
    assert torch.all((found - expected / 3005).abs() <= expected / 3005 * 2.0**-22)


def test_candidates_start_with_the_identity_and_span_the_grid() -> None:
    x_mean, w_mean = torch.rand(12) * 10, torch.rand(12)
    scales, labels = candidate_scales(x_mean, w_mean, 20)
    assert scales.shape == (42, 12)
    assert torch.equal(scales[0], torch.ones(12))
    assert labels[0].kind == "identity"
    assert [(label.kind, label.alpha) for label in labels[1:4]] == [("duo", 0.0), ("plain", 0.05), ("duo", 0.05)]
    assert {(kind, step / 20) for kind in ("plain", "duo") for step in range(21)} - {("plain", 0.0)} == {
        (label.kind, label.alpha) for label in labels[1:]
    }
    for scale, label in zip(scales[1:], labels[1:], strict=True):
        plain = x_mean**label.alpha
        wanted = plain if label.kind == "plain" else plain / (w_mean ** (1 - label.alpha) + 1e-4)
        wanted = wanted.clamp_min(1e-4)
        # powers, a division, a square root: a few fp32 roundings of 2^-24 each
        torch.testing.assert_close(scale, wanted / (wanted.max() * wanted.min()).sqrt(), rtol=2.0**-20, atol=0)
        torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0), rtol=2.0**-20, atol=0)


def test_dead_channels_keep_one_and_do_not_move_the_others() -> None:
    x_mean, w_mean = torch.tensor([0.0, 4.0, 0.0, 9.0]), torch.rand(4) + 0.1
    scales, _ = candidate_scales(x_mean, w_mean, 5)
    assert torch.equal(scales[:, [0, 2]], torch.ones(len(scales), 2))
    without, _ = candidate_scales(x_mean[[1, 3]], w_mean[[1, 3]], 5)
    assert torch.equal(scales[:, [1, 3]], without)


@pytest.mark.parametrize("value", [0.0, float("inf"), 1e-42, 3e38])
def test_candidates_are_always_usable(value: float) -> None:
    x_mean = torch.tensor([value, 1.0, 0.5, value])
    scales, _ = candidate_scales(x_mean, torch.tensor([0.0, 1.0, 0.0, 1e-30]), 20)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


@CONFIGS
def test_the_choice_is_the_least_loss_that_hurts_no_linear(backend: None, config: AwqConfig) -> None:
    x = activations(72)
    moment, x_mean = x.T @ x, x.abs().mean(0)
    weights = [torch.randn(90, 72), torch.randn(20, 72) * 0.1]
    choice = search_scale(weights, x_mean, [moment] * 2, [config] * 2)
    losses = []
    candidates, labels = candidate_scales(
        x_mean, weight_mean(weights, [config.group_size] * len(weights)), config.n_grid
    )
    for weight in weights:
        rows = 0
        if config.search_rows:
            rows = min(len(weight), max(64, config.search_rows * len(weight) // 110))
        found = reference.scale_losses(weight, candidates, moment, max_rows=rows, **config.quantizer)
        losses.append(found * (len(weight) / (rows or len(weight))))
    table = torch.stack(losses)
    allowed = (table <= table[:, :1]).all(0)
    totals = table.sum(0).masked_fill(~allowed, float("inf"))
    assert choice.scale is not None, "channels 30 times larger make the identity a bad choice"
    index = [(label.kind, label.alpha) for label in labels].index((choice.kind, choice.alpha))
    assert torch.equal(choice.scale, candidates[index])
    assert allowed[index] or config.search_rows  # equal up to rounding where the two backends round differently
    # fp32 sums over 72 channels in either order: relative 72 * 2^-24 each
    assert totals[index] <= totals.min() * (1 + 2 * 72 * 2.0**-24)
    if config.search_rows in (0, 512):  # all rows were ranked
        for weight in weights:
            rtn, best = round_to_nearest(weight, config), round_to_nearest(weight, config, choice.scale)
            loss = float(row_losses(weight, best, moment, choice.scale).plain.sum())
            assert loss < float(row_losses(weight, rtn, moment).plain.sum())


def test_the_identity_wins_ties(backend: None) -> None:
    """Weights that the quantizer holds exactly: every loss is 0 at the identity."""
    weight = torch.randint(0, 16, (8, 32)).float()
    weight[:, ::16], weight[:, 1::16] = 0, 15
    x = activations(32)
    assert search_scale([weight], x.abs().mean(0), [x.T @ x], [AwqConfig(group_size=16)]).scale is None


def test_one_linear_is_not_sacrificed_for_another() -> None:
    """The sum would gain from a scale that makes the small Linear worse than RTN; such a scale is out."""
    generator = torch.Generator().manual_seed(3)
    hurt = 0
    for seed in range(12):
        x = activations(32, seed=seed)
        moment, x_mean = x.T @ x, x.abs().mean(0)
        loud = torch.randn(64, 32, generator=generator)
        exact = torch.randint(0, 16, (64, 32), generator=generator).float()
        exact[:, 0], exact[:, 1] = 0, 15
        config = AwqConfig(group_size=-1, search_rows=0)
        alone = search_scale([loud], x_mean, [moment], [config])
        both = search_scale([loud, exact], x_mean, [moment] * 2, [config] * 2)
        apart = search_scale([loud, exact], x_mean, [moment] * 2, [config] * 2, alone=True)
        assert alone.scale is None or apart.scale is not None, "the second Linear does without"
        hurt += alone.scale is not None
        assert both.scale is None, "the second Linear is exact at the identity alone"
    assert hurt > 6


@CONFIGS
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_loss_is_the_squared_output_error(
    backend: None, config: AwqConfig, scaled: bool, dtype: torch.dtype
) -> None:
    x, weight = activations(72), torch.randn(33, 72).to(dtype)
    scale = torch.rand(72).add(0.5) if scaled else None
    found = round_to_nearest(weight, config, scale)
    loss = float(row_losses(weight, found, x.T @ x, scale).plain.sum())
    restored = reference.dequantize_weight(found.codes(), found.scales, found.zeros, config.group_size).double()
    if scale is not None:
        restored = restored / scale
    error = restored - weight.double()
    direct = float((error @ x.double().T).square().sum())
    # G holds fp32 sums of 200 products, e G e^T fp32 sums of 72: their roundings weigh sum |e| |G| |e| <= |e|^2 tr G
    bound = (200 + 2 * 72) * 2.0**-24 * float(error.square().sum()) * float(x.square().sum())
    assert abs(loss - direct) <= bound
    assert bound < 0.2 * direct, "the bound would let a wrong formula pass"


@CONFIGS
def test_a_clip_never_hurts_where_groups_do_not_interact(backend: None, config: AwqConfig) -> None:
    """With a second moment that is zero outside the diagonal blocks the clip's objective is the whole loss."""
    x, weight = activations(72), torch.randn(40, 72) ** 3
    g = reference.group_length(72, config.group_size)
    blocks = torch.arange(72) // g
    moment = (x.T @ x) * (blocks[:, None] == blocks[None, :])
    scale = torch.rand(72).add(0.5)
    clip = search_clip(weight, moment, config, scale)
    assert clip.shape == (40, reference.group_count(72, config.group_size))
    assert set(clip.unique().tolist()) <= {torch.tensor(r).item() for r in CLIP_RATIOS}
    assert (clip < 1).any()

    def lost(ratio: Tensor | None) -> Tensor:
        error = round_to_nearest(weight, config, scale, ratio).dequantize(scale) - weight
        return kernels.quadratic_loss(error, moment)

    full, clipped = lost(None), lost(clip)
    # every group's loss fell or stayed; the row's sum is rounded once per channel in fp32
    assert torch.all(clipped <= full * (1 + 72 * 2.0**-23))
    assert clipped.sum() < full.sum()


def test_rows_are_spread_evenly() -> None:
    cpu = torch.device("cpu")
    assert spread_rows(10, 5, cpu).tolist() == [0, 2, 4, 6, 8]
    assert spread_rows(3, 5, cpu).tolist() == [0, 1, 2]
    assert spread_rows(3, 0, cpu).tolist() == [0, 1, 2]


class Counted:
    """Kernels whose loss of a candidate is given by its number: the candidates are told apart by their first channel."""

    def __init__(self, candidates: Tensor, losses: Tensor) -> None:
        self.candidates, self.losses = candidates, losses
        self.seen: list[int] = []

    def scale_losses(self, weight: Tensor, candidates: Tensor, *args: object, **settings: object) -> Tensor:
        numbers = [int((self.candidates == row).all(1).nonzero()[0, 0]) for row in candidates]
        self.seen += numbers
        return self.losses[numbers]


@pytest.mark.parametrize("n_grid", [1, 2, 3, 4, 5, 19, 20, 21])
def test_every_third_step_leads_to_the_least_of_each_family(n_grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_mean, weight = torch.rand(32) * 10 + 0.1, torch.randn(8, 32)
    config = AwqConfig(group_size=16, n_grid=n_grid)
    candidates, labels = candidate_scales(x_mean, weight_mean([weight], [16]), n_grid)
    for best in range(len(candidates)):
        # falls to the best and rises after it, in its own family; the other one is flat, and worse
        distance = torch.tensor([abs(i - best) if i % 2 == best % 2 else 100 + i for i in range(len(candidates))])
        counted = Counted(candidates, 1.0 + distance.double())
        monkeypatch.setattr(kernels, "scale_losses", counted.scale_losses)
        if best % 2:
            counted.losses[0] = 200.0  # the identity is a candidate of the other family
        choice = search_scale([weight], x_mean, [torch.eye(32)], [config])
        assert (choice.kind, choice.alpha) == (labels[best].kind, labels[best].alpha)
        assert len(counted.seen) == len(set(counted.seen))
        if n_grid >= 19:
            assert len(counted.seen) <= 0.67 * len(candidates)
