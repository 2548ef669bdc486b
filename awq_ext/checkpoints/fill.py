"""Fill a model with the layers and tensors of a checkpoint, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import TILED, QuantLinear
from ..modules import take_hooks
from ..reporting.warn import warn
from ..standins.standins import stand_in_as
from ..standins.transposed import has_transposed_form
from ..undo import interrupt
from ..undo.journal import Journal
from .formats import CheckpointError, PackedLinear
from .formats.packed import exactly
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
    ignore: whether to pass over a tensor of this name, which the model lacks, in silence; others are warned about. None makes any
        such tensor an error.
    CheckpointError, before anything is changed, when a tensor is missing or does not fit.
    """
    with Journal() as journal:
        take_apart(model, source, journal)
        plan = _Plan(model, source, dtype)
        plan.match(ignore)
        layers = {name: plan.layer(name) for name in source.layers}
        values = plan.values()
        for name, layer in layers.items():
            journal.set_module(model, name, layer)
        _assign(model, values, plan.tied)
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

    @property
    def tied(self) -> Mapping[str, str]:
        """Names that the checkpoint wants to be one tensor with another."""
        return {} if self.source.in_memory is None else self.source.in_memory.tied

    def match(self, ignore: Callable[[str], bool] | None) -> None:
        """Decide which ``tensors`` to take; everything that the headers tell is checked."""
        for name in self.source.layers:
            self._linear(name)
        wanted = dict(self._wanted())
        extra = []
        for name in self.source.floats:
            if name in wanted:
                self._check(name, wanted[name])
                self.tensors.append(name)
            elif ignore is None or not ignore(name):
                extra.append(name)
        self._refuse_extra(extra, fatal=ignore is None)
        self._check_ties(wanted)
        self._refuse_missing(wanted)

    def _check_ties(self, wanted: dict[str, Tensor]) -> None:
        """Require both ends of each tie: in a layer of the files, whose tensors are checked with it, or in ``wanted``."""
        for name, stored in self.tied.items():
            for end in (name, stored):
                if end not in wanted and end.rpartition(".")[0] not in self.source.layers:
                    raise CheckpointError(f"{self.source.folder} has {end}, which the model lacks")
            if name in wanted:
                self._check(name, wanted[name])

    def _refuse_extra(self, extra: list[str], fatal: bool) -> None:
        if not extra:
            return
        text = f"{self.source.folder} has {len(extra)} tensors that the model lacks, among them {extra[0]}"
        if fatal:
            raise CheckpointError(text)
        warn(text)

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
            raise CheckpointError(f"{name} has shape {shape} in the file, {tuple(old.shape)} in the model")
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
        for name in self.tensors:
            key, old = wanted[name]
            if key not in made:
                interrupt.check()
                trained = isinstance(old, nn.Parameter)
                tensor = self.source.float_tensor(name)
                tensor = self._cast(tensor, old) if trained else tensor.to("cpu" if old.is_meta else old.device)
                made[key] = nn.Parameter(tensor, requires_grad=old.requires_grad) if trained else tensor
        return {name: made[key] for name, (key, _) in wanted.items() if key in made}

    def layer(self, name: str) -> QuantLinear:
        """Make the QuantLinear for one quantized layer of the files."""
        interrupt.check()
        old, packed = self._linear(name), self.source.layer(name)
        if (old.in_features, old.out_features) != (packed.in_features, packed.out_features):
            raise CheckpointError(
                f"layer {name!r} is {packed.in_features} -> {packed.out_features} features in the files, in the model "
                f"{old.in_features} -> {old.out_features}"
            )
        near = old.tiles if isinstance(old, QuantLinear) else old.weight
        saved, compute = (None, "auto") if self.source.in_memory is None else self.source.in_memory.layers[name]
        dtype = self.dtype or saved or self._float_dtype(old)
        scales = run_time_scales(packed, dtype, name)
        layer = QuantLinear(
            packed.in_features, packed.out_features, packed.group_size, False, False, dtype, device="meta"
        )
        move = lambda t: t if near.is_meta else t.to(near.device)  # noqa: E731
        layer.qweight, layer.scales, layer.zeros = move(packed.qweight), move(scales), move(packed.zeros)
        if packed.pre_quant_scale is not None:
            layer.pre_quant_scale = move(packed.pre_quant_scale)
        layer.bias = self._bias(name, old, packed)
        layer.compute = compute
        take_hooks(layer, old)
        return layer.train(old.training)

    def _bias(self, name: str, old: nn.Linear | QuantLinear, packed: PackedLinear) -> nn.Parameter | None:
        bias = fitting_bias(packed, old.bias is not None, name)
        return None if bias is None else nn.Parameter(self._cast(bias, old.bias), requires_grad=old.bias.requires_grad)

    def _float_dtype(self, old: nn.Linear | QuantLinear) -> torch.dtype:
        """Guess the dtype that the weights had before: that of the files' largest float tensor."""
        if not hasattr(self, "_common"):
            kinds = {n: self.source.dtype(n) for n in self.source.floats}
            floats = [n for n, kind in kinds.items() if kind.is_floating_point]
            largest = max(floats, key=lambda n: torch.Size(self.source.shape(n)).numel(), default=None)
            self._common = None if largest is None else kinds[largest]
        return self._common or (old.dtype if isinstance(old, QuantLinear) else old.weight.dtype)


def fitting_bias(packed: PackedLinear, wanted: bool, name: str) -> Tensor | None:
    """Take the bias of the files for a layer that has one in the model; CheckpointError where only one of both has it."""
    # some GPTQ writers give every layer one, of zeros
    there = packed.bias is not None and (wanted or bool(packed.bias.any()))
    if there != wanted:
        raise CheckpointError(f"layer {name!r} has a bias in {'the files' if there else 'the model'} only")
    return packed.bias if there else None


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
        f"layer {name!r} has float32 scales, which the int4 layers hold in 16 bits: give dtype=torch.float16 or "
        "torch.bfloat16 to round them, as other readers of this format do"
    )
