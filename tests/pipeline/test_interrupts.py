"""An exception or Ctrl-C at any stage: the model bit for bit as it was, no hook, no suspended forward, no mode left behind."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NamedTuple

import models
import pytest
import torch
from checks import Snapshot
from forks import Forks

import awq_ext
from awq_ext import QuantLinear

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}


class Label(NamedTuple):
    """Which call of what raises which error, before or after the real work."""

    name: str
    at: int
    after: bool
    error: type[BaseException]


class Trap:
    """Stands in for a function: the run forks at its ``at``-th call, and each error is raised before the real work and after."""

    def __init__(self, forks: Forks, at: int) -> None:
        self.forks, self.at = forks, at
        self.calls = 0

    def install(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def stand_in(*args: Any, **kwargs: Any) -> Any:  # a plain function binds as a method too
            self.calls += 1
            now = self.calls == self.at
            if now:
                fork_to_each_error(self.forks, name, self.at, after=False)
            result = real(*args, **kwargs)
            if now:
                fork_to_each_error(self.forks, name, self.at, after=True)
            return result

        patch.setattr(owner, name, stand_in)


def fork_to_each_error(forks: Forks, name: str, at: int, after: bool) -> None:
    for error in ERRORS:
        forks.fork(Label(name, at, after, error), lambda error=error: fail(error))


def fail(error: type[BaseException]) -> None:
    raise error("on purpose")


def assert_on_purpose(label: Label, error: BaseException | None) -> None:
    """It came out of the call; afterwards it holds none of its frames."""
    if not isinstance(error, label.error) or "on purpose" not in str(error):
        raise AssertionError(f"it ended in {error!r}") from error
    error.__traceback__ = None


def module(name: str) -> Any:
    # the package re-exports a function called like its module, so attribute access would find that
    return importlib.import_module(f"awq_ext.{name}")


# (module, class or None, name, which call: some that happen after the first block was swapped)
STAGES = [
    ("survey.survey", None, "survey", 1),
    ("calibration.importance", None, "_squared_gradients", 1),
    ("calibration.importance", None, "_squared_gradients", 2),
    ("calibration.importance", None, "_cotangents", 1),
    ("pipeline.run", None, "collect", 1),
    ("pipeline.run", None, "collect", 3),
    ("solving.block_solver", None, "search_scale", 6),
    ("folding.proof", None, "prove_norm_fold", 1),
    ("folding.proof", None, "prove_norm_folds", 1),
    ("folding.proof", None, "prove_linear_folds", 1),
    ("folding.proof", None, "find_rows", 2),
    ("folding.finder", None, "leaves_unchanged", 1),
    ("folding.finder", None, "leaves_unchanged", 2),
    ("forwards.probe", "Probe", "distance", 5),
    ("solving.rounding", None, "round_to_nearest", 20),
    ("solving.rounding", None, "search_clip", 9),
    ("solving.rounding", None, "row_losses", 30),
    ("pipeline.run", None, "build_layer", 1),
    ("pipeline.run", None, "build_layer", 10),
    ("undo.journal", "Journal", "set_module", 1),
    ("undo.journal", "Journal", "set_module", 9),
    ("undo.journal", "Journal", "set_module", 21),
    ("undo.journal", "Journal", "write_tensor", 1),
    ("undo.journal", "Journal", "write_tensor", 4),
    ("forwards.memory", "PeakMemory", "bytes", 2),
    ("pipeline.quantize", None, "reasons_to_stay", 1),
]


ERRORS = (KeyboardInterrupt, RuntimeError)
each_propagate = pytest.mark.parametrize("propagate", ["float", "quantized"])


def changed_model(name: str) -> models.Case:
    """A model in an unusual state, all of which must survive."""
    case = models.make(name)
    case.model.train()
    case.model.layers[1].eval()
    case.model.layers[0].requires_grad_(False)
    case.model.layers[2].register_forward_hook(lambda *_: None)
    return case


def reached_by(stage: tuple[str, str | None, str, int]) -> tuple[str, str]:
    """The model and the objective of which a run gets to ``stage``."""
    file, _, name, _ = stage
    return "offset" if name == "prove_norm_fold" else "cache", "model" if file == "calibration.importance" else "layer"


@pytest.mark.fault(
    "Interrupts",
    "Ctrl-C or an error at any stage of `quantize`, with propagate={propagate}",
    "The model is bit for bit as it was, and can be quantized afterwards",
)
@each_propagate
@pytest.mark.parametrize(("name", "objective"), dict.fromkeys(map(reached_by, STAGES)))
def test_an_interrupt_at_each_stage(name: str, objective: str, propagate: str) -> None:
    case, forks = changed_model(name), Forks()
    before = Snapshot(case.model)
    settings = FAST | {"propagate": propagate, "objective": objective}
    stages = [stage for stage in STAGES if reached_by(stage) == (name, objective)]

    def judge(label: Label, error: BaseException | None) -> None:
        assert_on_purpose(label, error)
        before.assert_unchanged()
        if label.at == 1 and label.after:  # and it can be quantized as if nothing had happened
            awq_ext.quantize(case.model, case.batches, **settings)
            assert isinstance(case.model.layers[2].mlp.up_proj, QuantLinear)

    with pytest.MonkeyPatch.context() as patch:
        for file, owner, function, at in stages:
            Trap(forks, at).install(patch, module(file) if owner is None else getattr(module(file), owner), function)
        forks.run(lambda: awq_ext.quantize(case.model, case.batches, **settings), judge)
    assert len(forks.labels) == 2 * len(ERRORS) * len(stages)


@pytest.mark.fault("Interrupts", "Ctrl-C or an error in the model's own forward", "The model is bit for bit as it was")
@each_propagate
@pytest.mark.parametrize("name", ["llama", "modes", "inplace"])
def test_an_interrupt_in_the_models_own_forward(name: str, propagate: str) -> None:
    """In the middle of a block: of the survey (calls 1 to 3), and of later batches in later blocks."""
    case, forks, wanted = changed_model(name), Forks(), (1, 4, 9, 14, 18)
    inner = "attention" if name == "llama" else "up"
    calls = [0]

    def called(*_: Any) -> None:
        calls[0] += 1
        if calls[0] in wanted:
            fork_to_each_error(forks, inner, calls[0], after=False)

    for layer in case.model.layers:
        layer.get_submodule(inner).register_forward_hook(called)
    before = Snapshot(case.model)

    def judge(label: Label, error: BaseException | None) -> None:
        assert_on_purpose(label, error)
        assert isinstance(error, awq_ext.CalibrationError) == (label.error is RuntimeError)
        before.assert_unchanged()

    forks.run(lambda: awq_ext.quantize(case.model, case.batches, propagate=propagate, **FAST), judge)
    assert len(forks.labels) == len(ERRORS) * len(wanted)


@pytest.mark.fault("Interrupts", "A warning is made an error", "The model is bit for bit as it was")
def test_a_warning_turned_into_an_error_is_an_error_like_any_other() -> None:
    """python -W error: quantize() either warns and succeeds, or raises and has changed nothing."""
    case = models.make("llama")
    with torch.no_grad():
        case.model.layers[1].attention.q_proj.weight[0, 0] = float("inf")
    case.model.layers[1].attention.v_proj.register_forward_hook(lambda m, a, out: out.fill_(float("nan")))
    before = Snapshot(case.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="NaN or Inf"):
            awq_ext.quantize(case.model, case.batches, **FAST)
    before.assert_unchanged()


def test_a_failed_call_leaves_an_earlier_report_alone() -> None:
    case = models.make("llama")
    awq_ext.quantize(case.model, case.batches, packed=False, bits=3, **FAST)
    report = case.model.awq_report
    with pytest.raises(awq_ext.CalibrationError):
        awq_ext.quantize(case.model, [*case.batches, torch.full((1, 4), 1000)], **FAST)
    assert case.model.awq_report is report
