"""Experts that a model keeps in one parameter [E, N, K], taken apart into Linears on which the model's own forward runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .batches import Call
from .blocks import CalibrationError, copy_inputs, run_call
from .experts import MATMULS, USES, ExpertLinears
from .groups import parameter_owners
from .journal import Journal
from .probe import distance_of, norm_of

# What ExpertLinears can answer as well as a tensor does.
_METADATA = ("shape", "dtype", "device")
# A mixture layer does some tens of operations one after another, each of which may be rounded differently once.
_ROUNDINGS = 32


@dataclass
class FusedWeight:
    """A parameter that may hold the matrices of experts: ``module._parameters[leaf]``, [E, N, K] or [E, K, N].

    original: the parameter; order: the names of all parameters beside it. reason: why it stays as it is, or "".
    """

    name: str
    module: nn.Module
    leaf: str
    original: nn.Parameter
    order: tuple[str, ...] = ()
    reason: str = ""
    use: str = ""

    def linears(self, use: str) -> ExpertLinears:
        """One Linear an expert; their weights are views of the parameter."""
        fused = self.original
        made = []
        for matrix in fused.detach():
            weight = matrix if use == "linear" else matrix.T
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=fused.requires_grad)
            made.append(linear)
        return ExpertLinears(made, use).train(self.module.training)

    def settle(self, journal: Journal) -> None:
        """Once experts are quantized: keep of those that stayed float what they need; put the parameter back if all did."""
        experts = self.module._modules[self.leaf]
        left = [linear for linear in experts.children() if isinstance(linear, nn.Linear)]
        if len(left) < len(experts):
            for linear in left:  # a view would keep the whole parameter
                weight = linear.weight
                linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            return
        start, end = self.original.data_ptr(), self.original.data_ptr() + self.original.nbytes
        parameter = self.original
        if not all(start <= linear.weight.data_ptr() < end for linear in left):
            parameter = _stacked(experts)
        journal.put_parameter(self.module, self.leaf, parameter, self.order)


def find_fused(
    model: nn.Module, excluded: Callable[[str, nn.Linear], str | None] = lambda *_: None
) -> list[FusedWeight]:
    """Parameters of three dimensions that modules of the user's hold directly: what fused experts look like.

    excluded: why a layer shall stay as it is, or None; the experts' names are ``parameter.0``, ``parameter.1``, ...
    Raises ValueError for weights on the meta device.
    """
    owners = parameter_owners(model)
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd) or type(module).__module__.startswith("torch.nn."):
            continue
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is None or parameter.dim() != 3 or min(parameter.shape) < 2:
                continue
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                continue
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: load the weights before quantizing")
            fused = FusedWeight(name, module, leaf, parameter, tuple(module._parameters))
            if others := [owner for owner in owners[id(parameter)] if owner != name]:
                fused.reason = f"its weight is shared with {', '.join(others)}"
            else:
                fused.reason = _reason_for_all(fused, excluded)
            found.append(fused)
    return found


def _reason_for_all(fused: FusedWeight, excluded: Callable[[str, nn.Linear], str | None]) -> str:
    reasons = [excluded(f"{fused.name}.{e}", linear) for e, linear in enumerate(fused.linears("linear").children())]
    return reasons[0] if reasons[0] and all(reasons) else ""


class _UseRecorder(TorchFunctionMode):
    """Sees what torch functions do with parameters: any tensor that lies in one's memory is known by its address."""

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
    """One of USES, "" for what only looks, or words for anything else."""
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


@contextmanager
def _eager(twins: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let modules run their own forward instead of a fused implementation."""
    real = {module: module.config for module in twins}
    try:
        for module, config in twins.items():
            module.config = config
        yield
    finally:
        for module, config in real.items():
            module.config = config


def eager_config(module: nn.Module) -> Any | None:
    """A copy of ``module.config`` by which transformers runs the module's own loop over experts; None: it does so already.

    Only the copy says so: the model's other modules share the config.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) in (None, "eager"):
        return None
    twin = copy.copy(config)
    # the property would write to the configs below, which the copy shares
    twin._experts_implementation_internal = "eager"
    return twin if twin._experts_implementation == "eager" else None


@dataclass
class Unfused:
    """What became of a model's fused experts.

    weights: those taken apart; refused: those that the first batch showed could not be; reasons: by name, why parameters stay as
    they are; configs: by name of the module, what its config was where its experts now run one by one.
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

    One forward shows how each parameter is used, a second one, on the Linears, must return the same bits (with a bias in the
    product: up to its rounding) and call them as often. A model whose experts run grouped is switched to its own loop first,
    which must agree within the rounding of its dtype. The others are put back, the very objects. ``mode(model)`` is entered for the
    forwards. Raises CalibrationError when the model rejects the batch.
    """
    wanted = [fused for fused in found if not fused.reason]
    result = Unfused()
    if wanted:
        twins = _eager_configs({fused.module for fused in wanted})
        with mode(model):
            _compare_loops(model, call, wanted, twins)
            with _eager(twins):
                _observe_and_prove(model, call, wanted, journal)
        result.weights = [fused for fused in wanted if not fused.reason]
        result.refused = [fused for fused in wanted if fused.reason]
        for fused in result.weights:
            fused.module._modules[fused.leaf].train(fused.module.training)
            if fused.module in twins and fused.module.config is not twins[fused.module]:
                result.configs[fused.name.rpartition(".")[0]] = fused.module.config
                journal.set_attribute(fused.module, "config", twins[fused.module])
    result.reasons = {fused.name: fused.reason for fused in found if fused.reason}
    return result


def _eager_configs(modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """By module, the config by which it runs its own loop; modules of one config share the new one."""
    by_config: dict[int, Any] = {}
    twins = {}
    for module in modules:
        config = getattr(module, "config", None)
        if (twin := by_config.setdefault(id(config), eager_config(module))) is not None:
            twins[module] = twin
    return twins


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        output = run_call(model, Call(copy_inputs(call.args), copy_inputs(call.kwargs)), 0)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare_loops(model: nn.Module, call: Call, wanted: Sequence[FusedWeight], twins: Mapping[nn.Module, Any]) -> None:
    """Give a reason to those whose own loop computes something else than what runs now, on the very same input."""
    if not twins:
        return
    errors: dict[nn.Module, float] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with _eager({module: twins[module]}):
            again = module.forward(*args, **kwargs)
        tensors, others = ([t for t in tree_leaves(o) if isinstance(t, Tensor)] for o in (output, again))
        error = distance_of(tensors, others) / (norm_of(tensors) or 1.0)
        errors[module] = max(error, errors.get(module, 0.0))

    with ExitStack() as stack:
        for module in twins:
            stack.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        _run(model, call)
    for fused in wanted:
        if errors.get(fused.module, 0.0) > _ROUNDINGS * torch.finfo(fused.original.dtype).eps:
            now = fused.module.config._experts_implementation
            fused.reason = f"one by one its experts compute something else than {now} (by {errors[fused.module]:.1e})"


def _observe_and_prove(model: nn.Module, call: Call, wanted: Sequence[FusedWeight], journal: Journal) -> None:
    recorder = _UseRecorder(wanted)
    with recorder:
        before = _run(model, call)
    for fused in wanted:
        uses = recorder.uses[fused.name]
        kinds = sorted(set(uses))
        if not fused.reason and not (len(kinds) == 1 and kinds[0] in USES):
            odd = [kind for kind in kinds if kind not in USES] or kinds
            fused.reason = "; ".join(odd) if odd else "not used by the first calibration batch"
        fused.use = kinds[0] if not fused.reason else ""
    taken = [fused for fused in wanted if not fused.reason]
    if not taken:
        return
    mark = len(journal)
    counts = {fused.name: 0 for fused in taken}

    def count(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            counts[name] += 1

        return called

    with ExitStack() as stack:
        for fused in taken:
            linears = fused.linears(fused.use)
            for linear in linears.children():
                stack.callback(linear.register_forward_pre_hook(count(fused.name)).remove)
            journal.replace_parameter(fused.module, fused.leaf, linears)
        try:
            after, problem = _run(model, call), ""
        except CalibrationError as error:
            after, problem = [], f": {error.__cause__}"
    expected = {
        f.name: len(recorder.uses[f.name]) * (len(f.module._modules[f.leaf]) if f.use == "bmm" else 1) for f in taken
    }
    same = _same_bits(before, after)
    if not same and recorder.biased and not problem:
        # the bias is added to an output that was rounded before
        eps = max(torch.finfo(fused.original.dtype).eps for fused in taken)
        same = distance_of(after, before) <= _ROUNDINGS * eps * norm_of(before)
    if counts != expected or not same:
        journal.rollback(mark)
        for fused in taken:
            fused.reason = f"with its experts taken apart the model's output is not the same{problem}"


def _same_bits(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors, others, strict=True)
    )


def unfuse_as(model: nn.Module, name: str, use: Any, journal: Journal) -> None:
    """Take apart the parameter called ``name`` as :func:`unfuse` once did, without a batch.

    Raises ValueError where the model has no such parameter. Experts that are apart already stay.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        raise ValueError(f"the model has no module {prefix!r}, which holds the experts") from None
    held = module._modules.get(leaf)
    if isinstance(held, ExpertLinears) and held.use == use:
        return
    parameter = module._parameters.get(leaf)
    if use not in USES or parameter is None or parameter.dim() != 3:
        raise ValueError(f"{name} holds no fused experts that could be taken apart (use {use!r})")
    journal.replace_parameter(module, leaf, FusedWeight(name, module, leaf, parameter).linears(use))
    if (twin := eager_config(module)) is not None:
        journal.set_attribute(module, "config", twin)


def put_back(model: nn.Module, journal: Journal) -> None:
    """Make one parameter again of experts that are all float Linears."""
    for module in list(model.modules()):
        for leaf, experts in list(module._modules.items()):
            if isinstance(experts, ExpertLinears) and all(isinstance(e, nn.Linear) for e in experts.children()):
                journal.put_parameter(module, leaf, _stacked(experts), (*module._parameters, leaf))


def _stacked(experts: ExpertLinears) -> nn.Parameter:
    """The parameter [E, N, K] (or [E, K, N]) that holds the weights of these Linears."""
    weights = [linear.weight for linear in experts.children()]
    matrices = [w.detach() if experts.use == "linear" else w.detach().T for w in weights]
    return nn.Parameter(torch.stack(matrices), requires_grad=weights[0].requires_grad)
