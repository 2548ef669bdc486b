"""Statistics of calibration: every row that counts, counted once, whatever its batch looked like."""

from __future__ import annotations

from types import ModuleType

import models
import pytest
import torch
from checks import hook_count
from torch import Tensor, nn

import awq_ext
from awq_ext import _C, CalibrationError
from awq_ext.calibration.statistics import GroupStatistics, InputStatistics, collect
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block, lockstep
from awq_ext.kernels import reference
from awq_ext.survey.blocks import find_blocks
from awq_ext.survey.budget import statistics_bytes
from awq_ext.survey.survey import BlockSurvey, survey

CPU = torch.device("cpu")


def linears_in(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def surveys_of(model: nn.Module, calls: list[Call]) -> list[BlockSurvey]:
    return survey(model, find_blocks(model), linears_in(model), calls[0])


def statistics(
    model: nn.Module, calls: list[Call], kernels: ModuleType = _C, hold: bool = False
) -> dict[str, GroupStatistics]:
    """By the first Linear of each group, over all blocks of the model."""
    surveys = surveys_of(model, calls)
    found = {}
    with torch.no_grad(), lockstep(model, [s.block for s in surveys], calls) as visits:
        for surveyed, (_, stops) in zip(surveys, visits, strict=True):
            books, _ = collect(surveyed, stops, kernels, CPU, hold or surveyed is surveys[-1])
            found |= {group.linears[0]: book for group, book in zip(surveyed.groups, books, strict=True)}
    assert hook_count(model) == 0
    return found


def rows_of(model: nn.Module, calls: list[Call], names: list[str]) -> dict[str, Tensor]:
    """All rows that enter the Linears in plain forwards: [T, K], with those masked out by ``attention_mask`` left out."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    mask: Tensor | None = None

    def note(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        seen[name].append((flat if mask is None else flat[mask.reshape(-1) != 0]).clone())

    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, a, k, n=n: note(n, a[0]), with_kwargs=True)
        for n in names
    ]
    with torch.no_grad():
        for call in calls:
            mask = call.kwargs.get("attention_mask")
            model(*call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def assert_statistics(book: GroupStatistics, rows: Tensor) -> None:
    assert book.rows == len(rows)
    exact = rows.double()
    mean = exact.abs().mean(0)
    # the sum is fp64, the mean is rounded once to fp32
    assert torch.all((book.x_mean() - mean).abs() <= mean * 2.0**-23 + 1e-30)
    # a sum of T products in fp32, in any order
    bound = (len(rows) + 2) * 2.0**-24 * (exact.abs().T @ exact.abs())
    (one,) = {id(one): one for one in book.inputs.values()}.values()
    assert torch.all((one.stats.second_moment() - exact.T @ exact).abs() <= bound)


@pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("name", ["llama", "twice", "uncalled", "modes", "dict", "shared_block", "mlp"])
def test_every_row_of_every_batch_counts_once(name: str, hold: bool, kernels: ModuleType) -> None:
    case = models.make(name)
    calls = [Call(args=(batch,)) for batch in case.batches]
    found = statistics(case.model, calls, kernels, hold)
    for linear, rows in rows_of(case.model, calls, list(found)).items():
        assert_statistics(found[linear], rows)
        assert found[linear].rows_seen == len(rows)


def padded(ids: list[Tensor], length: int) -> Call:
    """The sequences [1, T] of ``ids`` in one batch, padded on the right with token 7, and the mask that says so."""
    rows = [torch.nn.functional.pad(x, (0, length - x.shape[1]), value=7) for x in ids]
    mask = torch.stack([(torch.arange(length) < x.shape[1]).long() for x in ids])
    return Call(kwargs={"ids": torch.cat(rows), "attention_mask": mask})


def test_masked_rows_do_not_count() -> None:
    """Padding on the right cannot reach a causal model's real tokens, so the unpadded batches have the same statistics."""
    model = models.make("llama").model
    ids = [torch.randint(0, models.VOCAB, (1, length)) for length in (5, 11, 8, 2)]
    calls = [padded(ids[:3], 11), padded(ids[3:], 6)]
    found = statistics(model, calls)
    alone = rows_of(model, [Call(args=(x,)) for x in ids], list(found))
    for name, book in found.items():
        assert book.rows == 26
        assert book.rows_seen == 39
        # attention over a padded row sums in another order: compare with a little room, not bit for bit
        torch.testing.assert_close(book.x_mean(), alone[name].abs().mean(0), rtol=1e-4, atol=1e-5)
        assert_statistics(book, rows_of(model, calls, [name])[name])


def test_masked_and_unpadded_calibration_give_one_model() -> None:
    ids = [torch.randint(0, models.VOCAB, (1, length)) for length in (25, 11, 18, 7)]
    calls = [padded(ids[:2], 25).kwargs, padded(ids[2:], 20).kwargs]
    options = {"group_size": 16, "progress": False, "n_grid": 4, "clip": False}
    masked = awq_ext.quantize(models.make("llama").model, calls, **options)
    plain = awq_ext.quantize(models.make("llama").model, ids, **options)
    unmasked = awq_ext.quantize(models.make("llama").model, [c["ids"] for c in calls], **options)
    tokens = [[r.tokens for r in model.awq_report.layers if r.tokens] for model in (masked, plain, unmasked)]
    assert set(tokens[0]) == {61}
    assert tokens[0] == tokens[1]
    assert set(tokens[2]) == {90}
    for a, b in zip(masked.awq_report.layers, plain.awq_report.layers, strict=True):
        assert (a.scale, a.alpha) == (b.scale, b.alpha)
        if a.loss is not None:
            assert a.loss == pytest.approx(b.loss, rel=1e-3)


def test_nan_in_masked_rows_spoils_nothing() -> None:
    """Attention over rows that are all masked is NaN in some implementations; such rows count nowhere, proofs included."""
    model = models.Net(models.MlpBlock).eval()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    calls = [padded([torch.randint(8, models.VOCAB, (1, n)) for n in (5, 11)], 11).kwargs]
    report = awq_ext.quantize(model, calls, group_size=16, n_grid=4, progress=False).awq_report
    assert report.warnings == []
    assert [report[f"layers.{i}.up"].applied for i in range(3)] == ["norm"] * 3
    assert all(block.output_error == block.output_error for block in report.blocks), "NaN in the report"


def test_the_survey_orders_blocks_as_they_are_called() -> None:
    class Reversed(models.Net):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(ids)
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    model = Reversed()
    found = surveys_of(model, [Call(args=(torch.zeros(1, 6, dtype=torch.long),))])
    assert [s.block.name for s in found] == ["layers.2", "layers.1", "layers.0"]
    assert found[0].input_bytes == 6 * models.HIDDEN * 4
    k, inner = models.HIDDEN, models.INNER
    assert statistics_bytes(found[0]) == 3 * (4 * k * k + 16 * k) + 4 * inner * inner + 16 * inner
    assert hook_count(model) == 0


def test_a_block_called_twice_makes_the_model_one_block() -> None:
    model = models.make("shared_block").model
    (found,) = surveys_of(model, [Call(args=(torch.zeros(1, 6, dtype=torch.long),))])
    assert found.block == Block("", model)
    assert len(found.groups) == 12


def test_a_rejected_batch_in_the_survey_leaves_no_hook() -> None:
    model = models.Net()
    with pytest.raises(CalibrationError, match=r"batch 0 \(tensor shapes \[\(1, 3\), \(1,\)\]\).*inputs=\"first\""):
        surveys_of(model, [Call(args=(torch.full((1, 3), models.VOCAB), torch.zeros(1)))])
    assert hook_count(model) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_statistics_know_that_they_are_not_finite(bad: float) -> None:
    book = InputStatistics(_C.ActivationStats(4))
    book.stats.update(torch.ones(3, 4))
    assert book.finite
    book.stats.update(torch.tensor([[1.0, bad, 1.0, 1.0]]))
    assert not book.finite


def test_squares_that_overflow_are_not_finite_either() -> None:
    """|x| fits fp32, x^2 does not: no search is possible on such a second moment."""
    book = InputStatistics(_C.ActivationStats(4))
    book.stats.update(torch.full((3, 4), 1e25))
    assert not book.finite
