"""Interrupts: a real SIGINT at every line of a call leaves the model as it was, or finished; none is lost, none too many."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from forks import Forks
from safetensors.torch import load_file
from torch import nn

import awq_ext
from awq_ext.forwards.mode import calibration_mode
from awq_ext.undo import interrupt
from awq_ext.undo.journal import Journal

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}
# Files that put something in place and take it away again: of their lines more are tried than of all others.
DENSE = (
    "contextlib.py",
    "groups.py",
    "hooks.py",
    "interrupt.py",
    "journal.py",
    "lockstep.py",
    "mode.py",
    "probe.py",
    "session.py",
    "statistics.py",
    "survey.py",
)
Line = tuple[str, int, str]  # file, number, function
# After these an interrupted call has done all it should.
AT_THE_END = (
    "announcement.py",
    "attached.py",
    "contextlib.py",
    "conversions.py",
    "interrupt.py",
    "journal.py",
    "keeping.py",
    "quantize.py",
    "session.py",
    "team.py",
    "thread_state.py",
)


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def press() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


class Lines:
    """A tracer: counts the lines that run in the package and in what it leaves things to; calls ``reached`` before each."""

    def __init__(self, reached: Callable[[int, Line], None] = lambda number, line: None) -> None:
        self.reached = reached
        self.lines: list[Line] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/awq_ext/" not in file and not file.endswith(("/contextlib.py", "torch/utils/hooks.py")):
            return None
        if event == "line":
            self.lines.append((file.rpartition("/")[2], frame.f_lineno, frame.f_code.co_name))
            self.reached(len(self.lines), self.lines[-1])
        return self

    def run(self, work: Callable[[], Any]) -> list[Line]:
        before = sys.gettrace()  # coverage's, say
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)
        return self.lines


def press_at(wanted: list[int], work: Callable[[], Any], check: Callable[[Line], None]) -> None:
    """Run ``work`` and press Ctrl-C at the lines of these numbers: between any two lines is where Python would bring it.

    Each time it must raise KeyboardInterrupt, and then pass ``check``.
    """
    forks, numbers = Forks(), set(wanted)

    def untraced() -> None:
        sys.settrace(None)
        press()

    def reached(number: int, line: Line) -> None:
        if number in numbers:
            forks.fork(line, untraced)

    def judge(line: Line, error: BaseException | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            raise AssertionError(f"a Ctrl-C ended in {error!r}") from error
        error.__traceback__ = None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        check(line)

    forks.run(lambda: Lines(reached).run(work), judge)
    assert len(forks.labels) == len(numbers)


def moments(lines: list[Line], count: int | None) -> list[int]:
    """Numbers of about ``count`` lines to press Ctrl-C at, when they run first or last; two in three of them in DENSE.

    None: every line once, in turns when it runs first and last.
    """
    first: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        first.setdefault(line, number)
        last[line] = number
    if count is None:
        return sorted({(first, last)[i % 2][line] for i, line in enumerate(first)})
    found = sorted({*first.values(), *last.values()})
    dense = [number for number in found if lines[number - 1][0] in DENSE]
    rest = [number for number in found if lines[number - 1][0] not in DENSE]
    return sorted({*_spread(dense, 2 * count // 3), *_spread(rest, count // 3)})


def _spread(numbers: list[int], count: int) -> list[int]:
    return numbers[:: max(1, len(numbers) // count)]


def unusual(name: str) -> models.Case:
    case = models.make(name)
    case.model.train()
    case.model.layers[1].eval()
    case.model.layers[2].register_forward_hook(lambda *_: None)
    return case


def quantize(case: models.Case) -> None:
    awq_ext.quantize(case.model, case.batches, **FAST)


def evaluate(case: models.Case) -> None:
    awq_ext.evaluate(case.model, case.batches, reference=case.model)


def plan(case: models.Case) -> None:
    awq_ext.plan(case.model, case.batches[0], group_size=16)


def sensitivity(case: models.Case) -> None:
    awq_ext.sensitivity(case.model, case.batches, by="block", **FAST)


def salience(case: models.Case) -> None:
    awq_ext.salience(case.model, case.batches, {"same": case.batches}, group_size=16)


WORK = {quantize: 120, plan: 40, evaluate: 40, salience: 40, sensitivity: 40}
# Of what is quantize() once more, a few hundred lines are enough here too.
MORE = {quantize: None, plan: 300, evaluate: None, salience: 300, sensitivity: 300}
SAMPLES = [
    *(pytest.param(work, count, id=work.__name__) for work, count in WORK.items()),
    *(pytest.param(work, n, id=f"{work.__name__}-more", marks=pytest.mark.exhaustive) for work, n in MORE.items()),
]


@pytest.mark.filterwarnings("ignore:.*tokens are few")
@pytest.mark.parametrize(("work", "count"), SAMPLES)
def test_a_signal_at_any_line(work: Callable[[models.Case], None], count: int | None) -> None:
    work(unusual("cache"))  # what is done only once in a process
    dry = unusual("cache")
    lines = Lines().run(lambda: work(dry))
    wanted = moments(lines, count)
    assert len(wanted) >= (len({*lines}) if count is None else count - 2)
    case = unusual("cache")
    before = Snapshot(case.model)

    def check(line: Line) -> None:
        if hasattr(case.model, "awq_report"):
            # it came when all was done
            assert work is quantize and (line[0] in AT_THE_END or line[-1] == "_attach")  # of the package's __init__
            assert isinstance(case.model.layers[2].mlp.down_proj, awq_ext.QuantLinear)
        else:
            before.assert_unchanged()

    press_at(wanted, lambda: work(case), check)


@pytest.mark.fault("Interrupts", "Ctrl-C at any line of `load`", "The model is as it was, or has all of the checkpoint")
@pytest.mark.parametrize("count", [30, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_a_signal_at_any_line_of_loading(count: int | None, tmp_path: Path) -> None:
    """The model given to load() is what it was, or has all of the checkpoint."""
    source = models.make("llama")
    quantize(source)
    folder = awq_ext.save(source.model, tmp_path)
    (file,) = folder.glob("*.safetensors")
    awq_ext.load(models.make("llama").model, folder)
    lines = Lines().run(lambda: awq_ext.load(models.make("llama").model, folder))
    filling = [number for number, line in enumerate(lines, 1) if line[2] in ("place", "_assign", "tie")]
    model = models.make("llama", seed=1).model
    before = Snapshot(model)

    def check(line: Line) -> None:
        if not any(isinstance(module, awq_ext.QuantLinear) for module in model.modules()):
            before.assert_unchanged()
            return
        again = awq_ext.save(model, tmp_path / "again", overwrite=True)
        (other,) = again.glob("*.safetensors")
        ours, theirs = load_file(other), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    press_at([*moments(lines, count), *_spread(filling, 10)], lambda: awq_ext.load(model, folder), check)


@pytest.mark.fault("Interrupts", "Ctrl-C", "It takes effect at the next block, layer or sample")
def test_a_ctrl_c_waits_for_a_check() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.held():
        press()
        reached.append("after the signal")
        interrupt.check()
        reached.append("after the check")
    assert reached == ["after the signal"]
    interrupt.check()  # it came once


def test_a_ctrl_c_waits_for_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.held():
        with interrupt.held():
            press()
        reached.append("after the inner body")
    assert reached == ["after the inner body"]


def test_an_error_of_the_body_does_not_swallow_it() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupt.held():
        press()
        raise ValueError("of the body")
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.fault("Interrupts", "A second Ctrl-C", "It takes effect at once")
def test_a_second_ctrl_c_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.held():
        press()
        press()
        pytest.fail("the second one waits too")
    interrupt.check()
    with interrupt.held():
        pass  # nor does the first one come back


def test_cleaning_up_after_a_ctrl_c_is_not_interrupted_by_another() -> None:
    model = models.make("llama").model
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), Journal() as journal:
        journal.set_module(model, "lm_head", nn.Linear(1, 1))
        try:
            press()
            interrupt.check()
        finally:
            press()
    before.assert_unchanged()


def test_a_programs_own_handler_is_left_alone() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with interrupt.held(), calibration_mode(models.make("llama").model):
        press()
        assert seen == [signal.SIGINT]
        interrupt.check()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_that_the_body_sets_stays() -> None:
    def own(number: int, frame: FrameType | None) -> None:
        raise AssertionError

    with interrupt.held():
        signal.signal(signal.SIGINT, own)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is own


def test_another_thread_neither_holds_nor_raises_it() -> None:
    seen = []

    def work() -> None:
        with interrupt.held():
            interrupt.check()
            seen.append(signal.getsignal(signal.SIGINT))

    def in_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    in_thread()
    assert seen.pop() is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), interrupt.held():
        press()
        in_thread()  # not for it
        assert len(seen) == 1
        interrupt.check()


def test_a_long_run_is_interrupted_soon() -> None:
    """Within a block's forward, not at the end of all."""
    case = models.make("llama")
    calls = [0]

    def called(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            press()

    for layer in case.model.layers:
        layer.register_forward_pre_hook(called)
    before = Snapshot(case.model)
    with pytest.raises(KeyboardInterrupt):
        quantize(case)
    assert calls[0] <= 6
    before.assert_unchanged()
