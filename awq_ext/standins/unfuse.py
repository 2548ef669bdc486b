"""Unfusing: experts in one parameter are taken apart where a batch proves that the model computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..forwards.calls import CalibrationError, Call, run_call
from ..forwards.hooks import Hooks
from ..forwards.outputs import distance_of, float_tensors, norm_of
from ..undo.journal import Journal
from .eager import eager, eager_configs, eager_errors
from .expert_linears import MATMULS, USES
from .fused import FusedWeight

# A mixture layer does some tens of operations one after another, each of which may be rounded differently once.
_ROUNDINGS = 32


@dataclass
class Unfused:
    """What became of a model's fused experts.

    weights: the parameters taken apart. refused: those that the first batch showed could not be. reasons: why parameters stay as
    they are, by name. configs: the former configs of modules whose experts run one by one now, by name of the module.
    """

    weights: list[FusedWeight] = field(default_factory=list)
    refused: list[FusedWeight] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)


def unfuse(
    model: nn.Module,
    call: Call,
    found: Sequence[FusedWeight],
    journal: Journal,
    mode: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> Unfused:
    """Take apart those of ``found`` for which the first batch proves that the model then computes the same.

    A first forward shows how each parameter is used. A second one, on the Linears, must call them as often and return the same
    bits (up to the rounding of the bias, where the product has one). A model whose experts run grouped is switched to its own
    loop over them before that, which must agree with it within the rounding of its dtype. Parameters that fail are put back, the
    very objects. The forwards run in ``mode(model)``. Raises CalibrationError when the model rejects the batch.
    """
    wanted = [fused for fused in found if not fused.reason]
    result = Unfused()
    if wanted:
        configs = eager_configs({fused.module for fused in wanted})
        with mode(model):
            _compare_eager(model, call, wanted, configs)
            with eager(configs):
                _observe_and_prove(model, call, wanted, journal)
        result.weights = [fused for fused in wanted if not fused.reason]
        result.refused = [fused for fused in wanted if fused.reason]
        for fused in result.weights:
            fused.module._modules[fused.leaf].train(fused.module.training)
            if fused.module in configs and fused.module.config is not configs[fused.module]:
                result.configs[fused.name.rpartition(".")[0]] = fused.module.config
                journal.set_attribute(fused.module, "config", configs[fused.module])
    result.reasons = {fused.name: fused.reason for fused in found if fused.reason}
    return result


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        return float_tensors(run_call(model, call.on_copies(), 0))


def _compare_eager(
    model: nn.Module, call: Call, wanted: Sequence[FusedWeight], configs: Mapping[nn.Module, Any]
) -> None:
    """Refuse parameters of modules whose own loop computes something else than what runs now, on the very same input."""
    if not configs:
        return
    with eager_errors(configs) as errors:
        _run(model, call)
    for fused in wanted:
        if errors.get(fused.module, 0.0) > _ROUNDINGS * torch.finfo(fused.original.dtype).eps:
            now = fused.module.config._experts_implementation
            fused.reason = f"one by one its experts compute something else than {now} (by {errors[fused.module]:.1e})"


def _observe_and_prove(model: nn.Module, call: Call, wanted: Sequence[FusedWeight], journal: Journal) -> None:
    recorder = UseRecorder(wanted)
    with recorder:
        before = _run(model, call)
    for fused in wanted:
        _judge(fused, sorted(set(recorder.uses[fused.name])))
    taken = [fused for fused in wanted if not fused.reason]
    if not taken:
        return
    mark = len(journal)
    try:
        (after, calls), problem = _run_apart(model, call, taken, journal), ""
    except CalibrationError as error:
        after, calls, problem = [], Counter(), f": {error.__cause__}"
    expected = Counter({f.name: len(recorder.uses[f.name]) * (len(f.original) if f.use == "bmm" else 1) for f in taken})
    same = _same_bits(before, after)
    if not same and recorder.biased and not problem:
        # the bias is added to an output that was rounded before
        eps = max(torch.finfo(fused.original.dtype).eps for fused in taken)
        same = distance_of(after, before) <= _ROUNDINGS * eps * norm_of(before)
    if calls != expected or not same:
        journal.rollback(mark)
        for fused in taken:
            fused.reason = f"with its experts taken apart the model's output is not the same{problem}"


def _run_apart(
    model: nn.Module, call: Call, taken: Sequence[FusedWeight], journal: Journal
) -> tuple[list[Tensor], Counter[str]]:
    """Take parameters apart and run the model; return its output, and how often the Linears of each parameter were called."""
    calls: Counter[str] = Counter()
    with Hooks() as on:
        for fused in taken:
            linears = fused.linears(fused.use)
            for linear in linears.children():
                on.input(linear, lambda *_, name=fused.name: calls.update([name]))
            journal.replace_parameter(fused.module, fused.leaf, linears)
        return _run(model, call), calls


def _judge(fused: FusedWeight, kinds: Sequence[str]) -> None:
    """Note how a parameter is used if that is one of USES and always the same, else the reason to leave it."""
    if not fused.reason and not (len(kinds) == 1 and kinds[0] in USES):
        odd = [kind for kind in kinds if kind not in USES] or kinds
        fused.reason = "; ".join(odd) if odd else "not used by the first calibration batch"
    fused.use = kinds[0] if not fused.reason else ""


def _same_bits(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors, others, strict=True)
    )


# What ExpertLinears can answer as well as a tensor does.
_METADATA = ("shape", "dtype", "device")


class UseRecorder(TorchFunctionMode):
    """Records how torch functions use parameters; a view of one is recognized by its address."""

    def __init__(self, fused: Sequence[FusedWeight]) -> None:
        super().__init__()
        self._places = {f.name: (f.original.data_ptr(), f.original) for f in fused}
        self.uses: dict[str, list[str]] = {f.name: [] for f in fused}
        self.biased = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta":
                self._see(func, args, kwargs, tensor)
        return func(*args, **kwargs)

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> None:
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # inside torch.vmap, whose tensors lie nowhere
            return
        for name, (start, parameter) in self._places.items():
            if start <= address < start + parameter.nbytes and parameter.device == tensor.device:
                if use := _use_of(func, args, kwargs, tensor, parameter):
                    self.uses[name].append(use)
                    self.biased |= use == "linear" and (args[2:] or (kwargs.get("bias"),))[0] is not None
                return


def _use_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, parameter: nn.Parameter
) -> str:
    """Name a use of a parameter: one of USES, "" for what reads no values, or a description of anything else."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA:
        return ""
    second = args[1] if len(args) > 1 else kwargs.get("weight")
    if tensor.shape == parameter.shape:
        if name == "__getitem__":
            one = type(second) is int or (isinstance(second, Tensor) and second.dim() == 0)
            return "" if one else "several of its matrices are read at once"
        return "bmm" if name == "bmm" and second is tensor and len(args) == 2 else f"{name} uses all of it"
    if tensor.shape == parameter.shape[1:] and tensor.stride() == parameter.stride()[1:] and second is tensor:
        if func is F.linear:
            return "linear"
        if name in MATMULS:
            return "matmul"
    return f"{name} uses a part of it"
