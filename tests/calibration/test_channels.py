"""Channel means, their uncertainty, and rankings, against the formulas written out."""

from __future__ import annotations

import pytest
import torch

from awq_ext.calibration.channels import Agreement, ChannelMeans, agreement, spearman, top_count


def fed(batches: list[torch.Tensor]) -> ChannelMeans:
    means = ChannelMeans(batches[0].shape[-1])
    for x in batches:
        means.update(x)
    return means


def test_the_means_are_those_of_all_rows() -> None:
    batches = [torch.randn(2, n, 5) for n in (3, 7, 4)]
    means = fed(batches)
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    assert means.rows == 28
    torch.testing.assert_close(means.x_mean(), rows.abs().mean(0))
    torch.testing.assert_close(means.abs_sum(), rows.abs().double().sum(0), rtol=1e-6, atol=0)
    even, odd = means.halves()
    torch.testing.assert_close(even, torch.cat([batches[0], batches[2]], 1).flatten(0, 1).abs().mean(0))
    torch.testing.assert_close(odd, batches[1].flatten(0, 1).abs().mean(0))


def test_masked_rows_do_not_count() -> None:
    x, mask = torch.randn(2, 6, 3), torch.rand(2, 6) < 0.5
    means = ChannelMeans(3)
    means.update(x, mask)
    assert means.rows == int(mask.sum())
    torch.testing.assert_close(means.x_mean(), x[mask].abs().mean(0))


def test_half_precision_is_summed_in_fp32() -> None:
    """100,000 ones: bf16 sums stop growing at 256."""
    assert fed([torch.ones(100_000, 1, dtype=torch.bfloat16)]).x_mean().item() == 1


@pytest.mark.parametrize("equal", [True, False])
def test_the_error_is_what_repeating_the_experiment_shows(equal: bool) -> None:
    """Batches with a level of their own: the rows of one depend on each other. 400 experiments of 20 batches."""
    generator = torch.Generator().manual_seed(1)
    values, errors = [], []
    for _ in range(400):
        sizes = [8] * 20 if equal else torch.randint(4, 13, (20,), generator=generator).tolist()
        levels = torch.rand(20, generator=generator) + 0.5
        batches = [
            level * (1 + 0.1 * torch.randn(n, 1, generator=generator)) for level, n in zip(levels, sizes, strict=True)
        ]
        means = fed(batches)
        values.append(means.x_mean().item())
        errors.append(means.relative_error().item())
    spread = torch.tensor(values).std().item() / torch.tensor(values).mean().item()
    # the spread of 400 values is known to 1 / sqrt(800) = 3.5 %; 20 batches underestimate a little
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.12)


def test_one_batch_tells_nothing_about_its_error() -> None:
    means = fed([torch.randn(4, 3)])
    assert means.relative_error() is None and means.halves() is None


def test_snapshots_are_taken_at_powers_of_two() -> None:
    batches = [torch.randn(3, 2) for _ in range(9)]
    means = fed(batches)
    assert [rows for rows, _ in means.snapshots] == [3, 6, 12, 24]
    torch.testing.assert_close(means.snapshots[1][1], torch.cat(batches[:2]).abs().mean(0))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        ([1, 1, 2], [1, 2, 2], 0.5),  # ties share their mean rank: 1.5 1.5 3 and 1 2.5 2.5
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([1, 1, 1], [2, 2, 2], 1.0),
    ],
)
def test_spearmans_correlation(one: list[float], other: list[float], expected: float) -> None:
    assert spearman(torch.tensor(one).float(), torch.tensor(other).float()) == pytest.approx(expected)


def test_the_top_channels_that_agree() -> None:
    one = torch.zeros(400)
    one[:4] = torch.tensor([9.0, 8, 7, 6])
    other = torch.zeros(400)
    other[[0, 1, 50, 60]] = 5.0
    found = agreement(one, other)
    assert found.overlap == 0.5 and 0 < found.correlation < 1
    assert agreement(one, one) == Agreement(1.0, pytest.approx(1.0))


@pytest.mark.parametrize(("channels", "count"), [(5, 1), (100, 1), (149, 1), (151, 2), (4096, 41)])
def test_the_top_one_percent(channels: int, count: int) -> None:
    assert top_count(channels) == count
