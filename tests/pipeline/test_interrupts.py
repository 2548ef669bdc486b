"""An exception or Ctrl-C at any stage: the model bit for bit as it was, no hook, no suspended forward, no mode left behind."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from checks import Snapshot

import awq_ext
from awq_ext import QuantLinear

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}


class Trap:
    """Stands in for a function: its ``at``-th call raises, before or after the real work."""

    def __init__(self, real: Callable[..., Any], error: type[BaseException], at: int, after: bool) -> None:
        self.real, self.error, self.at, self.after = real, error, at, after
        self.calls = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise self.error("on purpose")
        result = self.real(*args, **kwargs)
        if self.calls == self.at:
            raise self.error("on purpose")
        return result

    def install(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        def stand_in(*args: Any, **kwargs: Any) -> Any:  # a plain function binds as a method too
            return self.run(*args, **kwargs)

        patch.setattr(owner, name, stand_in)


def module(name: str) -> Any:
    # the package re-exports a function called like its module, so attribute access would find that
    return importlib.import_module(f"awq_ext.{name}")


# (module, class or None, name, which call: some that happen after the first block was swapped)
STAGES = [
    ("survey.survey", None, "survey", 1),
    ("calibration.importance", None, "_squared_gradients", 1),
    ("calibration.importance", None, "_squared_gradients", 2),
    ("calibration.importance", None, "_cotangents", 1),
    ("pipeline.quantize", None, "collect", 1),
    ("pipeline.quantize", None, "collect", 3),
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
    ("pipeline.quantize", None, "build_layer", 1),
    ("pipeline.quantize", None, "build_layer", 10),
    ("undo.journal", "Journal", "set_module", 1),
    ("undo.journal", "Journal", "set_module", 9),
    ("undo.journal", "Journal", "set_module", 21),
    ("undo.journal", "Journal", "write_tensor", 1),
    ("undo.journal", "Journal", "write_tensor", 4),
    ("forwards.memory", "PeakMemory", "bytes", 2),
    ("pipeline.quantize", None, "reasons_to_stay", 1),
]


KINDS = pytest.mark.parametrize(
    ("error", "propagate"),
    [(KeyboardInterrupt, "float"), (RuntimeError, "quantized"), (KeyboardInterrupt, "quantized")],
)


def changed_model(name: str) -> models.Case:
    """A model in an unusual state, all of which must survive."""
    case = models.make(name)
    case.model.train()
    case.model.layers[1].eval()
    case.model.layers[0].requires_grad_(False)
    case.model.layers[2].register_forward_hook(lambda *_: None)
    return case


@KINDS
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("file", "owner", "name", "at"), STAGES, ids=[f"{owner or file}.{name}-{at}" for file, owner, name, at in STAGES]
)
def test_an_interrupt_at_each_stage(
    file: str, owner: str | None, name: str, at: int, after: bool, error: Any, propagate: str
) -> None:
    case = changed_model("offset" if name == "prove_norm_fold" else "cache")
    before = Snapshot(case.model)
    place = module(file) if owner is None else getattr(module(file), owner)
    settings = FAST | {"propagate": propagate, "objective": "model" if file == "importance" else "layer"}
    with pytest.MonkeyPatch.context() as patch:
        trap = Trap(getattr(place, name), error, at, after)
        trap.install(patch, place, name)
        with pytest.raises(error, match="on purpose") as caught:
            awq_ext.quantize(case.model, case.batches, **settings)
    assert trap.calls == at
    caught.value.__traceback__ = None
    del caught, trap
    before.assert_unchanged()
    # and it can be quantized as if nothing had happened
    if at == 1 and after:
        awq_ext.quantize(case.model, case.batches, **settings)
        assert isinstance(case.model.layers[2].mlp.up_proj, QuantLinear)


@KINDS
@pytest.mark.parametrize("at", [1, 4, 9, 14, 18])
@pytest.mark.parametrize("name", ["llama", "modes", "inplace"])
def test_an_interrupt_in_the_models_own_forward(name: str, at: int, error: Any, propagate: str) -> None:
    """In the middle of a block: of the survey (calls 1 to 3), and of later batches in later blocks."""
    case = changed_model(name)
    inner = "attention" if name == "llama" else "up"
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise error("on purpose")

    for layer in case.model.layers:
        layer.get_submodule(inner).register_forward_hook(fail)
    if name == "modes":
        for layer in case.model.layers:
            layer.seen = []
    before = Snapshot(case.model)
    with pytest.raises(error, match="on purpose") as caught:
        awq_ext.quantize(case.model, case.batches, propagate=propagate, **FAST)
    caught.value.__traceback__ = None
    if error is RuntimeError:
        assert isinstance(caught.value, awq_ext.CalibrationError)
    del caught
    before.assert_unchanged()


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
