"""Fill a model with the layers and tensors of a checkpoint, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import TILED, QuantLinear
from ..modules import take_hooks
from ..reporting.warn import warn
from ..standins.standins import stand_in_as
from ..standins.tied import keep_untied
from ..standins.transposed import has_transposed_form
from ..undo import interrupt
from ..undo.journal import Journal
from .formats import CheckpointError, PackedLinear, ShapeError
from .formats.packed import exactly, fitting_bias
from .model_source import dropped_ties, keep_apart
from .quantized_dir import QuantDir
from .renaming import Renamed


def place(
    model: nn.Module,
    source: QuantDir | Renamed,
    dtype: torch.dtype | None = None,
    ignore: Callable[[str], bool] | None = None,
) -> nn.Module:
    """Replace the Linears of ``model`` that ``source`` holds quantized by QuantLinear, and all other tensors; returns it.

    dtype: of float parameters; None keeps those of the files.
    ignore: whether to pass over a tensor of this name, which the model lacks, in silence; other tensors and layers that it lacks
        are left out with one warning. None makes any such tensor or layer an error.
    Tensors that are one in the model, but differ in the files, come apart, as transformers has it.
    CheckpointError, before anything is changed, when a tensor is missing or does not fit.
    """
    with Journal() as journal:
        take_apart(model, source, journal)
        plan = _Plan(model, source, dtype)
        plan.match(ignore)
        layers = {name: plan.layer(name) for name in plan.layers}
        values = plan.values()
        plan.tell()  # here still nothing happens where a warning is made an error
        for name, layer in layers.items():
            journal.set_module(model, name, layer)
        keep_untied(model, layers, journal)
        _assign(model, values, plan.tied)
    keep_apart(model, [name for name, _ in plan.untied])
    return model


def _assign(model: nn.Module, values: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Put tensors in their places; nothing here can fail, so that no half of it is ever done."""
    for name, value in values.items():
        held, leaf = _holder(model, name)
        held[leaf] = value
    tie(model, tied)


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Give each name in ``tied`` the very tensor that another name has; of int4 layers only where both are equal."""
    for name, stored in tied.items():
        (held, leaf), (source, source_leaf) = _holder(model, name), _holder(model, stored)
        # rows that are the same become other tiles where group sizes differ
        if leaf not in TILED.values() or torch.equal(held[leaf], source[source_leaf]):
            held[leaf] = source[source_leaf]


def _holder(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Find the dictionary of its module that holds a tensor, and its key there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, QuantLinear):
        leaf = TILED.get(leaf, leaf)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def take_apart(model: nn.Module, source: QuantDir | Renamed, journal: Journal) -> None:
    """Give ``model`` Linears where it has joined experts, or layers with a transposed weight."""
    found = {name: module for name, module in model.named_modules() if name in source.layers}
    transposed = {name: tuple(module.weight.shape) for name, module in found.items() if has_transposed_form(module)}
    try:
        stand_in_as(model, transposed, source.experts, journal)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


@dataclass
class _Plan:
    model: nn.Module
    source: QuantDir | Renamed
    dtype: torch.dtype | None
    tensors: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what the files have and the model has no place for
    untied: list[tuple[str, str]] = field(default_factory=list)  # names of one tensor in the model, of two in the files

    @property
    def tied(self) -> Mapping[str, str]:
        """Names that the checkpoint wants to be one tensor with another."""
        return {} if self.source.in_memory is None else self.source.in_memory.tied

    def match(self, ignore: Callable[[str], bool] | None) -> None:
        """Decide which ``layers`` and ``tensors`` to take; everything that the headers tell is checked."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.source.layers:
            if ignore is None or name in modules:
                self._linear(name)
                self.layers.append(name)
            else:
                self.left_out.append(name)
        self.left_out += getattr(self.source, "left_out", ())
        wanted = dict(self._wanted())
        for name in self.source.floats:
            if name in wanted:
                self._check(name, wanted[name])
                self.tensors.append(name)
            elif ignore is None or not ignore(name):
                self.left_out.append(name)
        if ignore is None and self.left_out:
            count = len(self.left_out)
            raise CheckpointError(
                f"{self.source.folder} has {count} tensors that the model lacks, among them {self.left_out[0]}"
            )
        self._check_ties(wanted)
        self._refuse_missing(wanted)

    def tell(self) -> None:
        """Warn of what did not go into the model as the files or the model had it."""
        tell_left_out(self.model, self.left_out, self.source.folder)
        for name, other in self.untied:
            warn(
                f"{self.source.folder} has {name} and {other} with different values, though the config says that they are one "
                "tensor (tie_word_embeddings): both are used as they are"
            )

    def _check_ties(self, wanted: dict[str, Tensor]) -> None:
        """Require both ends of each tie: in a layer of the files, whose tensors are checked with it, or in ``wanted``."""
        for name, stored in self.tied.items():
            for end in (name, stored):
                if end not in wanted and end.rpartition(".")[0] not in self.source.layers:
                    raise CheckpointError(f"{self.source.folder} has {end}, which the model lacks")
            if name in wanted:
                self._check(name, wanted[name])

    def _refuse_missing(self, wanted: dict[str, Tensor]) -> None:
        """Require each parameter and buffer to come from the files, share an object that does, or be a buffer with values."""
        come = {self._object(name, wanted[name]) for name in self.tensors}
        own = set(wanted if self.source.in_memory is not None else self.model.state_dict(keep_vars=True))
        for name, tensor in wanted.items():
            if self._object(name, tensor) in come or name in self.tied:
                continue
            if isinstance(tensor, nn.Parameter) or name in own:
                raise CheckpointError(f"{self.source.folder} lacks {name}, which the model needs")
            if tensor.is_meta:
                raise CheckpointError(
                    f"the buffer {name} is on the meta device, and no checkpoint of this layout holds it: build the model "
                    "on the CPU, or give from_pretrained the directory"
                )

    def _object(self, name: str, old: Tensor) -> int | str:
        """Identify a tensor by its object in the model, or by its name where the checkpoint says itself what is shared."""
        return id(old) if self.source.in_memory is None else name

    def _linear(self, name: str) -> nn.Linear | QuantLinear:
        try:
            found = self.model.get_submodule(name) if name else None
        except AttributeError:
            found = None
        if not isinstance(found, (nn.Linear, QuantLinear)):
            what = "no such module" if found is None else f"a {type(found).__name__} there"
            raise CheckpointError(f"{self.source.folder} has a quantized layer {name!r}, the model has {what}")
        return found

    def _wanted(self) -> Iterable[tuple[str, Tensor]]:
        """List the model's tensors outside the layers that are replaced, shared ones under all their names."""
        for books in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in books(remove_duplicate=False):
                if name.rpartition(".")[0] not in self.source.layers:
                    yield name, tensor

    def _check(self, name: str, old: Tensor) -> None:
        shape, dtype = self.source.shape(name), self.source.dtype(name)
        if shape != tuple(old.shape):
            raise ShapeError(f"{name} has shape {shape} in the file, {tuple(old.shape)} in the model")
        if dtype.is_floating_point != old.is_floating_point():
            raise CheckpointError(f"{name} has dtype {dtype} in the file, {old.dtype} in the model")

    def _cast(self, tensor: Tensor, near: Tensor | None) -> Tensor:
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor if near is None or near.is_meta else tensor.to(near.device)

    def values(self) -> dict[str, Tensor]:
        """Make the object to put at each name; shared tensors stay shared."""
        made: dict[int | str, Tensor] = {}
        wanted = {name: (self._object(name, old), old) for name, old in self._wanted()}
        first: dict[int | str, str] = {}
        # the embedding before a head that is tied to it: what is not in the files shares with the first
        dropped = dropped_ties(self.model)
        for name in sorted(self.tensors, key=dropped):
            key, old = wanted[name]
            if key in first:
                if torch.equal(self.source.float_tensor(name), self.source.float_tensor(first[key])):
                    continue
                self.untied.append((name, first[key]))
                key, wanted[name] = name, (name, old)
            first[key] = name
            interrupt.check()
            made[key] = self._value(name, old)
        return {name: made[key] for name, (key, _) in wanted.items() if key in made}

    def _value(self, name: str, old: Tensor) -> Tensor:
        """Make what takes the place of one parameter or buffer."""
        tensor = self.source.float_tensor(name)
        if not isinstance(old, nn.Parameter):
            return tensor.to("cpu" if old.is_meta else old.device)
        if name in self._dequantized:
            tensor = tensor.to(self.dtype or self._float_dtype(old.dtype))
        return nn.Parameter(self._cast(tensor, old), requires_grad=old.requires_grad)

    @property
    def _dequantized(self) -> Mapping[str, str]:
        return getattr(self.source, "dequantized", {})

    def layer(self, name: str) -> QuantLinear:
        """Make the QuantLinear for one quantized layer of the files."""
        interrupt.check()
        old, packed = self._linear(name), self.source.layer(name)
        if (old.in_features, old.out_features) != (packed.in_features, packed.out_features):
            raise ShapeError(
                f"layer {name!r} is {packed.in_features} -> {packed.out_features} features in the files, in the model "
                f"{old.in_features} -> {old.out_features}"
            )
        near = old.tiles if isinstance(old, QuantLinear) else old.weight
        saved, compute = (None, packed.compute) if self.source.in_memory is None else self.source.in_memory.layers[name]
        dtype = (
            self.dtype or saved or self._float_dtype(old.dtype if isinstance(old, QuantLinear) else old.weight.dtype)
        )
        scales = run_time_scales(packed, dtype, name)
        layer = QuantLinear(
            packed.in_features,
            packed.out_features,
            packed.group_size,
            False,
            False,
            dtype,
            device="meta",
            bits=packed.bits,
        )
        move = lambda t: t if near.is_meta else t.to(near.device)  # noqa: E731
        layer.qweight, layer.scales, layer.zeros = move(packed.qweight), move(scales), move(packed.zeros)
        if packed.pre_quant_scale is not None:
            layer.pre_quant_scale = move(packed.pre_quant_scale)
        layer.bias = self._bias(name, old, packed)
        layer.compute, layer.rescaled = compute, packed.rescaled
        take_hooks(layer, old)
        return layer.train(old.training)

    def _bias(self, name: str, old: nn.Linear | QuantLinear, packed: PackedLinear) -> nn.Parameter | None:
        bias = fitting_bias(packed, old.bias is not None, name)
        return None if bias is None else nn.Parameter(self._cast(bias, old.bias), requires_grad=old.bias.requires_grad)

    def _float_dtype(self, own: torch.dtype) -> torch.dtype:
        """Guess the dtype that weights had before: that of the files' largest float tensor, else their ``own`` in the model."""
        if not hasattr(self, "_common"):
            kinds = {n: self.source.dtype(n) for n in self.source.floats if n not in self._dequantized}
            floats = [n for n, kind in kinds.items() if kind.is_floating_point]
            largest = max(floats, key=lambda n: torch.Size(self.source.shape(n)).numel(), default=None)
            self._common = None if largest is None else kinds[largest]
        return self._common or own


def tell_left_out(model: nn.Module, names: Collection[str], folder: Any) -> None:
    """Warn once of what the files have and the model has no place for: the largest parts of it."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def absent(name: str) -> str:
        pieces = name.split(".")
        ways = (".".join(pieces[: count + 1]) for count in range(len(pieces)))
        return next((way for way in ways if way not in modules), name)

    if parts := list(dict.fromkeys(map(absent, names))):
        more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
        warn(
            f"{folder} has tensors for which {type(model).__name__} has no place; they were left out: "
            f"{', '.join(parts[:8])}{more}"
        )


def run_time_scales(packed: PackedLinear, dtype: torch.dtype, name: str) -> Tensor:
    """Cast the scales to fp16 or bf16, which is what the kernels read: exactly where possible.

    fp32 scales of a 16-bit model are rounded to the model's dtype, as vLLM and TensorRT-LLM do when they load them.
    CheckpointError for those of an fp32 model.
    """
    if packed.scales.dtype in (torch.float16, torch.bfloat16):
        return packed.scales
    for kind in (torch.float16, torch.bfloat16):
        if (scales := exactly(packed.scales, kind)) is not None:
            return scales
    if dtype in (torch.float16, torch.bfloat16):
        return packed.scales.to(dtype)
    raise CheckpointError(
        f"layer {name!r} has float32 scales, which a QuantLinear holds in 16 bits: give dtype=torch.float16 or "
        "torch.bfloat16 to round them, as other readers of this format do"
    )
