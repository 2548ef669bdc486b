"""Classes of transformers, each in a process of its own: made small, quantized, compared with plain rounding, saved and loaded."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import shrunk
import torch
from architectures import SETTINGS, Case
from checks import same_bits
from torch import Tensor, nn

import awq_ext

SECONDS = 300  # after which a class is given up
CALIBRATION, FRESH = slice(12), slice(12, None)  # batches
EQUAL, NO_PLACE = "equal", "the format has no place for it"


@dataclass
class Result:
    """What became of one class.

    problem: why it could not be made or quantized, or "". layers: how many are int4. ratio: the output error on fresh batches,
    relative to that of plain rounding with the same bits and groups. saved, native, default: EQUAL, NO_PLACE, or what is wrong, of
    the outputs once saved by ``save``, and by ``save_pretrained`` in the native and the default format (there the model that was
    rounded, as that format has no place for scales at run time).
    """

    made: bool = False
    problem: str = ""
    parameters: int = 0
    layers: int = 0
    ratio: float = float("nan")
    saved: str = ""
    native: str = ""
    default: str = ""


def outputs(case: Case, which: slice = slice(1)) -> list[Tensor]:
    """What the model returns first of all for each batch; some models draw random numbers on the way."""
    found = []
    for batch in case.batches[which]:
        torch.manual_seed(0)
        with torch.no_grad():
            output = case.model(**batch)
        found.append(output["logits"] if "logits" in output else output[0])
    return found


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the differences of all these tensors."""
    return sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5


def examine(kind: str, model_type: str, name: str, result: Result) -> None:
    """Do everything with one class, and note in ``result`` how far it goes."""
    # not run before they are quantized: RWKV's first forward writes to its weights
    float_case, case, rounded = (shrunk.make(kind, model_type, name) for _ in range(3))
    expected = outputs(float_case, FRESH)
    result.made = all(bool(tensor.isfinite().all()) for tensor in expected)
    result.parameters = sum(parameter.numel() for parameter in case.model.parameters())
    if not result.made:
        result.problem = "its outputs are not finite"
        return
    awq_ext.quantize(case.model, case.batches[CALIBRATION], **SETTINGS)
    awq_ext.quantize(rounded.model, rounded.batches[CALIBRATION], method="rtn", **SETTINGS)
    result.layers = sum(isinstance(module, awq_ext.QuantLinear) for module in case.model.modules())
    errors = [distance(outputs(one, FRESH), expected) for one in (case, rounded)]
    result.ratio = errors[0] / errors[1]

    def loaded(folder: Path) -> nn.Module:
        awq_ext.save(case.model, folder)
        return awq_ext.load(shrunk.make(kind, model_type, name, seed=1).model, folder)

    def native(folder: Path) -> nn.Module:
        return awq_ext.from_pretrained(awq_ext.save_pretrained(case.model, folder, format="native"))

    def default(folder: Path) -> nn.Module:
        return awq_ext.from_pretrained(awq_ext.save_pretrained(rounded.model, folder))

    result.saved, result.native, result.default = (
        _compared(case, loaded),
        _compared(case, native),
        _compared(rounded, default),
    )


def _compared(case: Case, trip: Callable[[Path], nn.Module]) -> str:
    """Compare a model with what comes back from a directory: EQUAL, or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            (found,), (now,) = outputs(Case(trip(Path(folder) / "x"), case.batches)), outputs(case)
        except awq_ext.CheckpointError as error:
            return NO_PLACE if "cannot hold this model" in str(error) else _described(error)
        except Exception as error:
            return _described(error)
    if same_bits(found, now):
        return EQUAL
    return f"outputs differ by {float((found - now).norm() / now.norm()):.1e}"


def _described(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(last.filename).name}:{last.lineno}): {error}"


@cache
def _ready() -> None:
    """Import once what all children need."""
    import transformers

    transformers.logging.set_verbosity_error()
    for name in ("LlamaForCausalLM", "T5ForConditionalGeneration"):
        getattr(transformers, name)


def run(kind: str, model_type: str, name: str) -> Result:
    """Examine one class in a child process, which is killed after SECONDS."""
    _ready()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a test runner may have
        child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(writer, kind, model_type, name)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Result(**json.loads(said)) if said else Result(problem=f"no answer within {SECONDS} s (status {status})")


def _answer(writer: int, *class_: str) -> None:
    """Write a Result to the pipe and end the process, without whatever the parent would do at its end."""
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    result = Result()
    try:
        warnings.simplefilter("ignore")
        examine(*class_, result)
    except BaseException as error:
        result.problem = _described(error)
    finally:
        try:
            with open(writer, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(asdict(result)))
        finally:
            os._exit(0)


def everything() -> list[tuple[str, str, str]]:
    """All kinds, model types and classes."""
    return [(kind, *each) for kind in shrunk.KINDS for each in shrunk.classes(kind)]


def identifier(kind: str, model_type: str, name: str) -> str:
    """One word for a class."""
    return f"{kind.lower().replace('_', '-')}/{model_type}/{name}"
