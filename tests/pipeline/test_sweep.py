"""Every class of transformers' auto-mapping tables: quantized better than by rounding, saved and loaded bit for bit.

A few of them by default, one of each kind that once failed or is built in another way; the others exhaustively.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="ALL CLASSES NOT TESTED: pip install 'awq-ext[hf]'")

import sweep
from shrunk_extra import CANNOT
from sweep import EQUAL, NO_PLACE, Result

CHOSEN = {
    "DeepseekV4ForCausalLM",  # files have other names for its norms
    "Inkling2ForCausalLM",  # files call a weight like a layer
    "RwkvForCausalLM",  # writes to its weights
    "JambaForCausalLM",
    "GPTBigCodeForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    "LEDForConditionalGeneration",
    "FunnelForMaskedLM",
    "ModernBertForMaskedLM",
    "FocalNetForImageClassification",  # convolutions
    "SwinForImageClassification",
    "TimmWrapperForImageClassification",  # cannot be made
}


def every_class() -> list[object]:
    return [
        pytest.param(*one, id=sweep.identifier(*one), marks=() if one[2] in CHOSEN else pytest.mark.exhaustive)
        for one in sweep.everything()
    ]


@pytest.mark.parametrize(("kind", "model_type", "name"), every_class())
def test_class(kind: str, model_type: str, name: str) -> None:
    result = sweep.run(kind, model_type, name)
    if name in CANNOT:
        assert not result.made
        assert CANNOT[name][1] in result.problem
        return
    assert result.made and not result.problem, result.problem
    assert result.layers > 0
    assert result.ratio < 1, f"output error {result.ratio:.3f} of that of rounding"
    assert (result.saved, result.native) == (EQUAL, EQUAL)
    assert result.default in (EQUAL, NO_PLACE)


def test_the_table_has_every_class() -> None:
    kinds = json.loads((Path(__file__).resolve().parents[2] / "docs" / "sweep.json").read_text())["kinds"]
    found = {(kind, *name.split("/")) for kind, rows in kinds.items() for name in rows}
    assert found == set(sweep.everything())


@pytest.mark.parametrize(
    ("end", "says"),
    [(lambda: time.sleep(60), "within 1 s"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "status -9")],
)
def test_a_class_that_hangs_or_crashes_is_given_up(
    end: Callable[[], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "SECONDS", 1)
    monkeypatch.setattr(sweep, "examine", lambda *_: end())
    result = sweep.run("CAUSAL_LM", "llama", "LlamaForCausalLM")
    assert not result.made
    assert says in result.problem


def test_an_error_is_described_and_what_was_found_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kind: str, model_type: str, name: str, result: Result) -> None:
        result.made, result.layers = True, 3
        raise ValueError(f"not {name}")

    monkeypatch.setattr(sweep, "examine", fails)
    result = sweep.run("CAUSAL_LM", "llama", "LlamaForCausalLM")
    assert (result.made, result.layers) == (True, 3)
    assert result.problem.startswith("ValueError (test_sweep.py:")
    assert result.problem.endswith(": not LlamaForCausalLM")
