"""Probes: a block under other parameters, which rows of it count, and that the real parameters come back."""

from __future__ import annotations

import models
import pytest
import torch
from checks import hook_count
from torch import Tensor, nn

from awq_ext.forwards.calls import Call
from awq_ext.forwards.probe import Probe, combined, output_dtypes, substituted


def test_substitutes_are_taken_back_after_an_error() -> None:
    block = models.MlpBlock()
    before = dict(block.up.named_parameters())
    with pytest.raises(ZeroDivisionError), substituted({(block.up, "weight"): torch.zeros(72, 40)}):
        assert not block.up.weight.any()
        raise ZeroDivisionError
    assert dict(block.up.named_parameters()) == before


def probe(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Probe:
    @torch.no_grad()
    def run() -> Tensor:
        return block(x.clone())

    return Probe(run, run(), lambda tensor: None if mask is None else mask.view(tensor.shape[:-1]))


def test_rows_that_do_not_count_are_left_out() -> None:
    block, x, mask = models.MlpBlock(), torch.randn(2, 3, models.HIDDEN), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    made = probe(block, x, mask)
    (output,), (first, second, never) = made.watch({}, [block.up, block.down, nn.Linear(5, 5)])
    assert torch.equal(output, block(x).detach()[mask])
    assert torch.equal(first, block.norm(x).detach()[mask])
    assert second.shape == (3, models.INNER)
    assert never.shape == (0, 5)
    assert hook_count(block) == 0
    changed = {(block.down, "bias"): block.down.bias.detach() + 1.0}
    assert made.distance(changed) == pytest.approx((3 * models.HIDDEN) ** 0.5, rel=1e-5)
    assert made.distance({}) == 0.0
    assert made.norm == pytest.approx(float(output.norm()))


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_what_a_block_only_passes_on_hides_no_error(low: float) -> None:
    linear, x = nn.Linear(5, 5), torch.randn(3, 5)
    hidden = linear(x).detach()
    run = lambda: (linear(x).detach(), torch.full((4, 4), low).triu(1), torch.ones(()))  # noqa: E731
    made = Probe(run, run())
    assert made.distance({(linear, "bias"): linear.bias.detach() + 1.0}) == pytest.approx(15**0.5, rel=1e-5)
    assert made.norm == pytest.approx(float(hidden.norm()))
    assert made.distance({(linear, "bias"): torch.full((5,), float("nan"))}) == float("inf")


def test_rows_are_those_of_tensors_that_have_any() -> None:
    """A batch of one token has a mask of one entry, which would fit a scalar too."""
    run = lambda: (torch.ones(1, 1, 4), torch.ones(()), torch.ones(4))  # noqa: E731
    call = Call(kwargs={"attention_mask": torch.ones(1, 1)})
    assert [one.shape for one in Probe(run, run(), call.row_mask).reference] == [(1, 4), (), (4,)]


def test_the_first_input_of_a_linear_that_is_called_twice() -> None:
    block, x = models.TwiceBlock(), torch.randn(1, 3, models.HIDDEN)
    (seen,) = probe(block, x).inputs([block.up], {})
    assert torch.equal(seen, block.norm(x).detach()[0])


def test_changes_of_one_parameter_follow_one_another_in_fp32() -> None:
    linear = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    third = lambda w: w / 3  # noqa: E731
    (made,) = combined([(linear, "weight", third), (linear, "weight", lambda w: w * 3)]).values()
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, linear.weight)


def test_dtypes_of_outputs() -> None:
    linears = [nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16), nn.Embedding(2, 2).half()]
    with output_dtypes(linears) as seen:
        linears[0](torch.zeros(2))
        linears[1](torch.zeros(2, dtype=torch.bfloat16))
    linears[2](torch.zeros(1, dtype=torch.int64))
    assert seen == {torch.float32, torch.bfloat16}
