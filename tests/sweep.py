"""Classes of transformers, one after another: made small, quantized, saved and loaded, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import shrunk
import torch
from architectures import SETTINGS, Case
from checks import same_bits
from torch import Tensor, nn

import awq_ext

SECONDS = 120  # after which a class is given up
Result = dict[str, Any]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model returns first of all; some draw random numbers on the way."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    return output["logits"] if "logits" in output else output[0]


def error_of(case: Case, expected: list[Tensor]) -> float:
    """Of the outputs for these batches, relative to their norm."""
    found = [logits(case.model, batch) for batch in case.batches]
    square = lambda tensors: sum(float(t.double().square().sum()) for t in tensors)  # noqa: E731
    return (square([a - b for a, b in zip(found, expected, strict=True)]) / square(expected)) ** 0.5


def examine(kind: str, model_type: str, name: str, note: Callable[[str, Any], None]) -> None:
    made = lambda seed=0: shrunk.make(kind, model_type, name, seed)  # noqa: E731
    case = made()
    expected = [logits(case.model, batch) for batch in case.batches]
    if not all(t.isfinite().all() for t in expected):
        raise ValueError("not finite")
    note("made", True)
    note("parameters", sum(p.numel() for p in case.model.parameters()))
    rtn = made()
    awq_ext.quantize(case.model, case.batches[:3], **SETTINGS)
    layers = sum(isinstance(module, awq_ext.QuantLinear) for module in case.model.modules())
    note("quantized", layers)
    note("warnings", case.model.awq_report.warnings)
    awq_ext.quantize(rtn.model, case.batches[:3], method="rtn", **SETTINGS)
    for which, part in (("calibration", slice(3)), ("fresh", slice(3, 6))):
        errors = [error_of(Case(one.model, one.batches[part]), expected[part]) for one in (case, rtn)]
        note(f"errors_{which}", errors)
    now = logits(case.model, case.batches[0])
    with tempfile.TemporaryDirectory() as folder:
        def trip(what: str, work: Callable[[Path], nn.Module], now: Tensor) -> None:
            try:
                note(what, same_bits(logits(work(Path(folder) / what), case.batches[0]), now))
            except Exception as error:
                note(what, said(error))
        def saved(to: Path) -> nn.Module:
            awq_ext.save(case.model, to)
            return awq_ext.load(made(1).model, to)
        def native(to: Path) -> nn.Module:
            awq_ext.save_pretrained(case.model, to, format="native")
            return awq_ext.from_pretrained(to)
        def default(to: Path) -> nn.Module:
            awq_ext.save_pretrained(rtn.model, to)
            return awq_ext.from_pretrained(to)
        trip("saved", saved, now)
        trip("saved2", lambda to: awq_ext.from_pretrained(Path(folder) / "saved"), now)
        trip("native", native, now)
        trip("default", default, logits(rtn.model, case.batches[0]))


def said(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} [{Path(last.filename).name}:{last.lineno}]"


def run(kind: str, model_type: str, name: str) -> Result:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a test runner may have
        child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS)
        result: Result = {"made": False}
        try:
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            examine(kind, model_type, name, result.__setitem__)
        except BaseException as error:
            result["error"] = said(error)
        finally:
            with open(writer, "w") as pipe:
                pipe.write(json.dumps(result))
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"made": False, "error": f"no answer within {SECONDS} s"}
