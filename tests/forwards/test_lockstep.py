"""Finding the blocks, and forwards in lockstep: same numbers, one boundary in memory, nothing left behind."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from checks import Snapshot, hook_count, suspended_greenlets
from torch import Tensor, nn

from awq_ext.forwards.calls import CalibrationError, Call
from awq_ext.forwards.inputs import copy_inputs
from awq_ext.forwards.lockstep import Block, lockstep
from awq_ext.survey.blocks import find_blocks
from awq_ext.undo.thread_state import ThreadState


def names(model: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(model)]


def calls_of(batches: Sequence[Tensor]) -> list[Call]:
    return [Call(args=(batch,)) for batch in batches]


def test_blocks_of_a_module_list() -> None:
    assert names(models.Net()) == ["layers.0", "layers.1", "layers.2"]


def test_blocks_of_a_sequential_of_one_class() -> None:
    assert names(models.sequential_mlp()) == ["0", "1", "2"]


def test_outermost_lists_only() -> None:
    inner = nn.Module()
    inner.experts = nn.ModuleList(models.MlpBlock() for _ in range(2))
    outer = nn.Module()
    outer.layers = nn.ModuleList([inner, models.MlpBlock()])
    outer.other = nn.ModuleList([models.MlpBlock(), models.MlpBlock()])
    assert names(outer) == ["layers.0", "layers.1", "other.0", "other.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        nn.ModuleDict({"a": models.MlpBlock()}),
        nn.ModuleList([models.MlpBlock()]),
        nn.ModuleList([models.MlpBlock(), nn.ReLU()]),
    ],
    ids=["plain", "linears", "dict", "one", "mixed"],
)
def test_no_repeated_blocks_means_one_block(model: nn.Module) -> None:
    (block,) = find_blocks(model)
    assert block == Block("", model)


def entries(model: nn.Module, blocks: Sequence[Block], run: Any) -> dict[tuple[int, str], Tensor]:
    """What enters each block, by batch (told apart by length) and block, while ``run`` runs."""
    seen: dict[tuple[int, str], Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        seen[x.shape[1], name] = x.detach().clone()

    hooks = [b.module.register_forward_pre_hook(lambda _, a, n=b.name: note(n, a[0])) for b in blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "modes", "inplace", "dict"])
def test_lockstep_computes_what_plain_forwards_do(name: str) -> None:
    """Bit for bit, with runs on copies in between, for batches of different lengths."""
    case = models.make(name)
    blocks = find_blocks(case.model)

    def plain() -> None:
        with torch.no_grad():
            for batch in case.batches:
                case.model(batch)

    def in_step() -> None:
        with lockstep(case.model, blocks, calls_of(case.batches)) as visits:
            for number, (block, stops) in enumerate(visits):
                assert block is blocks[number]
                assert [stop.call.args[0].shape[1] for stop in stops] == [b.shape[1] for b in case.batches]
                for stop in stops[number:]:  # some are advanced by hand, the others by the loop
                    stop.run_on_copies()
                    if number < 2:
                        stop.advance()

    expected, found = entries(case.model, blocks, plain), entries(case.model, blocks, in_step)
    assert expected.keys() == found.keys()
    assert len(found) == 12
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_a_run_on_copies_returns_the_blocks_output_and_leaves_its_inputs() -> None:
    case = models.make("inplace")
    layer = case.model.layers[0]
    x = case.model.embed(case.batches[0])
    with torch.no_grad(), lockstep(case.model, find_blocks(case.model), calls_of(case.batches)) as visits:
        _, stops = next(visits)
        expected = layer.forward(x.clone())
        assert torch.equal(stops[0].run_on_copies(), expected)
        assert torch.equal(stops[0].run_on_copies(), expected)


def test_copies_keep_shared_tensors_shared() -> None:
    x = torch.ones(2)
    (a, b), c = copy_inputs(((x, x), {"x": torch.zeros(1), "n": 3}))
    assert a is b
    assert a is not x
    assert c["n"] == 3


class Counted(models.Net):
    """Keeps weak references to the hidden states it hands from block to block."""

    def __init__(self) -> None:
        super().__init__(models.MlpBlock)
        self.states: list[weakref.ref[Tensor]] = []
        self.most = 0

    def alive(self) -> int:
        return sum(1 for state in self.states if state() is not None)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            self.states.append(weakref.ref(x))
            self.most = max(self.most, self.alive())
            x = layer(x)
        return x


@pytest.mark.parametrize("by_hand", [False, True])
def test_one_boundarys_hidden_states_are_alive(by_hand: bool) -> None:
    """n batches wait with one state each; the one that runs holds its input and its output: n + 1."""
    model, batches = Counted(), models.token_batches((3, 4, 5, 6, 7, 8))
    with lockstep(model, find_blocks(model), calls_of(batches)) as visits:
        for number, (_, stops) in enumerate(visits):
            assert model.alive() == len(batches)
            if by_hand and number < 2:
                for stop in stops:
                    stop.advance()
    del stops
    assert model.most <= len(batches) + 1
    assert model.alive() == 0


def modes() -> tuple[Any, ...]:
    return ThreadState.capture(), torch.is_inference_mode_enabled()


def test_every_forward_sees_its_own_modes_and_the_caller_keeps_his() -> None:
    case = models.make("modes")
    blocks, batches = find_blocks(case.model), case.batches
    alone: list[Any] = []
    with torch.no_grad():
        case.model(batches[0])
    for layer in case.model.layers:
        alone.append(layer.seen.copy())
        layer.seen.clear()
    # (grad, inference, autocast): the model opens enable_grad + autocast, then inference mode on top, then none
    assert alone == [[(True, False, True)], [(False, True, True)], [(False, False, False)]]
    with torch.autocast("cpu", dtype=torch.float16, enabled=False), torch.enable_grad():
        home = modes()
        with lockstep(case.model, blocks, calls_of(batches)) as visits:
            for number, (_, stops) in enumerate(visits):
                assert modes() == home
                for stop in stops:
                    stop.run_on_copies()
                    assert modes() == home
                if number < 2:
                    for stop in stops:
                        stop.advance()
                        assert modes() == home
                else:
                    stops[0].advance()  # one to its end, the others are cut off
                    assert modes() == home
        assert modes() == home
    # block k ran for every batch on copies, and once more where the forward went on
    for number, layer in enumerate(case.model.layers):
        count = 2 * len(batches) if number < 2 else len(batches) + 1
        assert layer.seen == alone[number] * count


class Failing(models.ModesNet):
    """Raises ``error`` in block ``block`` of the batch of length ``length``."""

    def __init__(self, block: int, length: int, error: type[BaseException]) -> None:
        super().__init__()

        def fail(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].shape[1] == length:
                raise error("on purpose")

        self.layers[block].up.register_forward_pre_hook(fail)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("length", [17, 9, 24], ids=["first", "middle", "last"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("on_copies", [False, True])
def test_an_error_in_any_batch_leaves_nothing(
    block: int, length: int, error: type[BaseException], on_copies: bool
) -> None:
    model, batches = Failing(block, length, error), models.token_batches()
    before = Snapshot(model)
    # a plain forward that runs on raises inside the model, so the message tells the batch
    expected = CalibrationError if error is RuntimeError else error
    with (
        pytest.raises(expected, match="on purpose") as caught,
        lockstep(model, find_blocks(model), calls_of(batches)) as visits,
    ):
        for _, stops in visits:
            for stop in stops:
                if on_copies:
                    stop.run_on_copies()
                stop.advance()
    if error is RuntimeError:
        number = [b.shape[1] for b in batches].index(length)
        assert f"batch {number} (tensor shapes [(2, {length})])" in str(caught.value)
    caught.value.__traceback__ = None
    before.assert_unchanged()


def test_an_error_of_the_caller_leaves_nothing() -> None:
    case = models.make("modes")
    before = Snapshot(case.model)
    with (
        pytest.raises(ZeroDivisionError),
        lockstep(case.model, find_blocks(case.model), calls_of(case.batches)) as visits,
    ):
        next(visits)
        assert hook_count(case.model) == 3
        assert len(suspended_greenlets()) == 4
        raise ZeroDivisionError
    before.assert_unchanged()


@pytest.mark.parametrize("stubborn", ["converts", "swallows"])
def test_a_model_that_catches_everything_is_ended_too(stubborn: str) -> None:
    """Cutting a forward off raises inside it; bare excepts are bad style, but they exist."""

    class Net(models.Net):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                try:
                    x = layer(x)
                except BaseException as error:
                    if stubborn == "converts":
                        raise RuntimeError("something went wrong") from error
            return x

    model = Net()
    before = Snapshot(model)
    with lockstep(model, find_blocks(model), calls_of(models.token_batches())) as visits:
        next(visits)
    before.assert_unchanged()


def test_blocks_in_another_order_are_refused() -> None:
    class Net(models.Net):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(ids)
            for number in (0, 1, 2) if ids.shape[1] != 9 else (1, 0, 2):
                x = self.layers[number](x)
            return x

    model = Net(models.MlpBlock)
    with (
        pytest.raises(CalibrationError, match=r"batch 2 came back to block 'layers\..'.* pass blocks=\[\]"),
        lockstep(model, find_blocks(model), calls_of(models.token_batches())) as visits,
    ):
        for _ in visits:
            pass
    assert hook_count(model) == 0


def test_no_threads_whatever_the_number_of_batches() -> None:
    model, tasks = models.make("llama").model, "/proc/self/task"

    def threads() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir(tasks)) if os.path.isdir(tasks) else 0

    def most(count: int) -> tuple[int, int]:
        with lockstep(model, find_blocks(model), calls_of([torch.zeros(1, 5, dtype=torch.long)] * count)) as visits:
            return max(threads() for _ in visits)

    most(1)  # torch's own threads start at first use
    assert most(64) == most(1) == threads()
