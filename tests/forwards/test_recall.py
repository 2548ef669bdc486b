"""Recall: products are spared where nothing changed, and only there; modules are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import models
import pytest
import torch
from torch import Tensor, nn

from awq_ext.forwards import recall
from awq_ext.forwards.probe import Probe, substituted
from awq_ext.forwards.recall import Recall


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def products(memory: Recall, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Run with what is remembered; return how many Linears multiplied, and the output."""
    with memory.used(), mock.patch.object(nn.functional, "linear", side_effect=nn.functional.linear) as linear:
        output = run()
    assert not any("forward" in vars(module) for module in memory._linears)
    return linear.call_count, output


def kept(block: nn.Module, x: Tensor) -> Recall:
    memory = Recall(module for module in block.modules() if isinstance(module, nn.Linear))
    assert torch.equal(memory.keep(block)(x), block(x))
    assert memory.kept
    return memory


def test_only_what_changed_is_multiplied() -> None:
    block, x = models.LlamaBlock(), torch.randn(2, 7, models.HIDDEN)
    memory = kept(block, x)
    count, output = products(memory, lambda: block(x.clone()))
    assert count == 0
    assert torch.equal(output, block(x))
    for module, name, expected in (
        (block.mlp.gate_proj, "weight", 2),  # itself and down
        (block.mlp.down_proj, "weight", 1),
        (block.post_norm, "weight", 3),
        (block.attention.v_proj, "weight", 5),  # all behind it
        (block.input_norm, "weight", 7),
    ):
        with substituted({(module, name): getattr(module, name) * 1.5}):
            count, output = products(memory, lambda: block(x.clone()))
            assert torch.equal(output, block(x))
        assert count == expected
    # powers of two that cancel leave the values as they were: what reads them is spared
    v, o = block.attention.v_proj, block.attention.o_proj
    with substituted({(v, "weight"): v.weight * 2, (o, "weight"): o.weight / 2}):
        count, output = products(memory, lambda: block(x.clone()))
    assert count == 2
    assert torch.equal(output, block(x))
    memory.end()
    assert not memory.kept
    assert products(memory, lambda: block(x))[0] == 7


class InPlace(nn.Module):
    """Changes what its Linear read or returned, in place."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.linear, self._which = nn.Linear(5, 5), which

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.linear(x)
        (x if self._which == "input" else y).mul_(2)
        return x + y


@pytest.mark.parametrize("which", ["input", "output"])
def test_what_the_model_changed_in_place_is_not_answered_with(which: str) -> None:
    block, x = InPlace(which), torch.randn(3, 5)
    memory = kept(block, x)
    for _ in range(2):
        count, output = products(memory, lambda: block(x))
        assert count == 1
        assert torch.equal(output, block(x))


def test_what_else_decides_on_a_product() -> None:
    linear, x = nn.Linear(5, 5), torch.randn(3, 5)
    memory = kept(linear, x)
    assert products(memory, lambda: linear(input=x))[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        count, output = products(memory, lambda: linear(x))
    assert (count, output.dtype) == (1, torch.bfloat16)
    with torch.enable_grad():
        count, output = products(memory, lambda: linear(x))
    assert count == 1
    assert output.requires_grad
    with torch.inference_mode():
        assert products(memory, lambda: linear(x + 0))[0] == 1
        strange = nn.Linear(5, 5)
    memory_of_none = Recall([strange])
    assert torch.equal(memory_of_none.keep(strange)(x), strange(x))
    assert not memory_of_none.kept
    for parameter in (linear.weight, linear.bias):
        memory = kept(linear, x)
        parameter.mul_(2)
        count, output = products(memory, lambda: linear(x))
        assert count == 1
        assert torch.equal(output, linear(x))


def test_linears_with_a_forward_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    own, patched, x = Own(5, 5), nn.Linear(5, 5), torch.randn(3, 5)
    forward = patched.forward = mock.Mock(return_value=x)
    memory = Recall([own, patched])
    memory.keep(nn.Sequential(own, patched))(x)
    assert not memory.kept
    assert patched.forward is forward


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)), torch.randn(3, 5)
    monkeypatch.setattr(recall, "MOST_KEPT", 3 * x.nbytes)  # one input, and two outputs of which one is the next input
    assert products(kept(block, x), lambda: block(x))[0] == 1


def test_a_probe_forgets_when_its_trials_end() -> None:
    block, x = models.MlpBlock(), torch.randn(2, 3, models.HIDDEN)
    memory = Recall([block.up, block.down])
    made = Probe(lambda: block(x.clone()), block(x), recall=memory)
    changed = {(block.down, "bias"): block.down.bias + 1.0}
    with made.recalling():
        assert made.distance({}) == 0.0  # the first run is kept
        assert memory.kept
        assert made.distance(changed) > 0
    assert not memory.kept
    with pytest.raises(ZeroDivisionError), made.recalling():
        made.distance({})
        raise ZeroDivisionError
    assert not memory.kept
