"""Scale groups: which Linears read the very same input, and which module produced it. Found by watching one forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .lookalikes import computes_linear, multiplies_transposed
from .qlinear import QuantLinear


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share one input scale, and the module (by name) whose output is their input, if one was seen.

    parts: the Linears that read the very same tensor, together; several for experts, each of which reads rows of its own.
    readers: parameters [., K], as (module, name), that read the producer's output too and can be multiplied by the scale.
    experts: those of the Linears that are experts. near: for Linears of one expert, the others of it, which alone may be its
    producers; family: equal for such groups of all experts.
    """

    linears: tuple[str, ...]
    producer: str | None
    parts: tuple[tuple[str, ...], ...] = ()
    readers: tuple[tuple[nn.Module, str], ...] = ()
    experts: frozenset[str] = frozenset()
    near: tuple[str, ...] = ()
    family: str = ""

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """``parts``, of which there is one if nothing else is said."""
        return self.parts or (self.linears,)


@dataclass
class Eligible:
    """The Linears of a model that can be quantized, and why the others stay as they are."""

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def eligible_linears(model: nn.Module, excluded: Callable[[str, nn.Linear], str | None]) -> Eligible:
    """Sort the Linears of ``model``. Left out: those ``excluded`` gives a reason for, forwards of their own, shared weights.

    Layers that do a Linear's work without being one (Conv1D of transformers) are named among the reasons.
    Raises ValueError, naming the layer, for a model that is quantized already, integer or meta weights.
    """
    owners = parameter_owners(model)
    found = Eligible()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            raise ValueError(
                f"{name} is a QuantLinear already: quantize the float model, a quantized one cannot be again"
            )
        if not isinstance(module, nn.Linear):
            if multiplies_transposed(module):
                found.reasons[name] = f"{type(module).__name__} is no nn.Linear (its weight is transposed)"
            continue
        if reason := _reason_to_leave(name, module, owners, excluded):
            found.reasons[name] = reason
        else:
            found.linears[name] = module
    return found


def _reason_to_leave(
    name: str, module: nn.Linear, owners: Mapping[int, list[str]], excluded: Callable[[str, nn.Linear], str | None]
) -> str | None:
    if reason := excluded(name, module):
        return reason
    if not computes_linear(module):
        return f"{type(module).__name__} has a forward of its own"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        return "its weight is computed by a parametrization"
    if others := [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]:
        return f"its weight is shared with {', '.join(others)}"
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load the weights before quantizing")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}.weight is {weight.dtype}: float32, bfloat16 or float16 is needed")
    # a sum is finite only if all terms are (fp32 holds the sum of any weight that can be quantized), and needs no copy
    if not torch.isfinite(weight.detach().sum(dtype=torch.float32)):
        return "its weight holds NaN or Inf"
    return None


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all names under which the model holds it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return owners


def tensor_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they are the same values in the same memory at the same moment of its history.

    Contiguous ones may differ in shape: a view [batch * sequence, K] is its base [batch, sequence, K], and [batch, sequence,
    heads, K / heads] too.
    """
    version = None if tensor.is_inference() else tensor._version
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype, version)
    if tensor.is_contiguous():
        return (*place, tensor.numel())
    return (*place, tuple(tensor.shape), tensor.stride())


def linear_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear was called with, by position or by name."""
    return args[0] if args else kwargs["input"]


class Watch:
    """What one forward of a block shows: the inputs of its Linears, the outputs of its norms, as identities.

    The tensors are kept alive while watching, else a freed one's memory could be taken for it by another.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[Any, ...]]] = {}
        self.outputs: dict[str, list[tuple[Any, ...]]] = {}
        self._alive: list[Tensor] = []

    def _see(self, book: dict[str, list[tuple[Any, ...]]], name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._alive.append(value)
            # empty ones lie nowhere: experts that no token came to would all seem to read one tensor
            identity = tensor_identity(value) if value.numel() else ("no rows of", name)
            book.setdefault(name, []).append(identity)

    @contextmanager
    def on(self, linears: Mapping[str, nn.Linear], producers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch while the body runs a forward."""
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._see(self.inputs, name, linear_input(args, kwargs)),
                with_kwargs=True,
            )
            for name, module in linears.items()
        ]
        hooks += [
            module.register_forward_hook(lambda _, __, output, name=name: self._see(self.outputs, name, output))
            for name, module in producers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.release()

    def release(self) -> None:
        """Let go of the tensors: the forward has left the block."""
        self._alive.clear()

    def groups(
        self, linears: Mapping[str, nn.Linear], kind: Callable[[str], Hashable] = lambda _: None
    ) -> list[ScaleGroup]:
        """Linears of one ``kind`` called with the same tensors, call by call, in the order they were first called."""
        members: dict[tuple[Any, ...], list[str]] = {}
        for name, identities in self.inputs.items():
            members.setdefault((linears[name].in_features, kind(name), *identities), []).append(name)
        return [ScaleGroup(tuple(names), self.producer(key[2:])) for key, names in members.items()]

    def producer(self, identities: tuple[Any, ...]) -> str | None:
        """The module whose outputs had these identities, call by call."""
        for name, outputs in self.outputs.items():
            if tuple(outputs) == identities:
                return name
        return None


def norm_candidates(block: nn.Module) -> dict[str, nn.Module]:
    """Modules below ``block`` that may be norms: no children, a 1-D weight, at most a bias of the same length beside it."""
    found = {}
    for name, module in block.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if weight is None or weight.dim() != 1 or any(module.children()):
            continue
        if set(parameters) <= {"weight", "bias"} and all(p.shape == weight.shape for p in parameters.values()):
            found[name] = module
    return found
