"""Placement: a QuantDir's layers and tensors put into a model, all of them or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.quant_linear import QuantLinear
from ..modules import take_hooks
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
        for name, value in values.items():
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = value
    return model


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

    def match(self, ignore: Callable[[str], bool] | None) -> None:
        """Fill ``tensors``; everything the headers tell is checked."""
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
        self._refuse_missing(wanted)

    def _refuse_extra(self, extra: list[str], fatal: bool) -> None:
        if not extra:
            return
        text = f"{self.source.folder} has {len(extra)} tensors that the model lacks, among them {extra[0]}"
        if fatal:
            raise CheckpointError(text)
        warnings.warn(text, UserWarning, stacklevel=5)

    def _refuse_missing(self, wanted: dict[str, Tensor]) -> None:
        """Every parameter and buffer must come from the files, share an object that does, or be a buffer that has values."""
        come = {id(wanted[name]) for name in self.tensors}
        own = set(self.model.state_dict(keep_vars=True))
        for name, tensor in wanted.items():
            if name in self.tensors or id(tensor) in come:
                continue
            if isinstance(tensor, nn.Parameter) or name in own:
                raise CheckpointError(f"{self.source.folder} lacks {name}, which the model needs")
            if tensor.is_meta:
                raise CheckpointError(
                    f"the buffer {name} is on the meta device, and no checkpoint of this layout holds it: build the model "
                    "on the CPU, or give from_pretrained the directory"
                )

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
        """Names of the model's tensors outside the layers that are replaced, all names of shared ones."""
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
        """Name -> the object to put there; shared tensors stay shared."""
        made: dict[int, Tensor] = {}
        placed = {}
        wanted = dict(self._wanted())
        for name in self.tensors:
            old = wanted[name]
            if id(old) not in made:
                interrupt.check()
                trained = isinstance(old, nn.Parameter)
                tensor = self.source.float_tensor(name)
                tensor = self._cast(tensor, old) if trained else tensor.to("cpu" if old.is_meta else old.device)
                made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if trained else tensor
        for name, old in wanted.items():
            if id(old) in made:
                placed[name] = made[id(old)]
        return placed

    def layer(self, name: str) -> QuantLinear:
        """The QuantLinear for one quantized layer of the files."""
        interrupt.check()
        old, packed = self._linear(name), self.source.layer(name)
        if (old.in_features, old.out_features) != (packed.in_features, packed.out_features):
            raise CheckpointError(
                f"layer {name!r} is {packed.in_features} -> {packed.out_features} features in the files, in the model "
                f"{old.in_features} -> {old.out_features}"
            )
        near = old.tiles if isinstance(old, QuantLinear) else old.weight
        dtype = self.dtype or self._float_dtype(old)
        scales = run_time_scales(packed, dtype, name)
        layer = QuantLinear(
            packed.in_features, packed.out_features, packed.group_size, False, False, dtype, device="meta"
        )
        move = lambda t: t if near.is_meta else t.to(near.device)  # noqa: E731
        layer.qweight, layer.scales, layer.zeros = move(packed.qweight), move(scales), move(packed.zeros)
        if packed.pre_quant_scale is not None:
            layer.pre_quant_scale = move(packed.pre_quant_scale)
        layer.bias = self._bias(name, old, packed)
        take_hooks(layer, old)
        return layer.train(old.training)

    def _bias(self, name: str, old: nn.Linear | QuantLinear, packed: PackedLinear) -> nn.Parameter | None:
        bias = fitting_bias(packed, old.bias is not None, name)
        return None if bias is None else nn.Parameter(self._cast(bias, old.bias), requires_grad=old.bias.requires_grad)

    def _float_dtype(self, old: nn.Linear | QuantLinear) -> torch.dtype:
        """The dtype of the files' largest float tensor: what the weights had before."""
        if not hasattr(self, "_common"):
            kinds = {n: self.source.dtype(n) for n in self.source.floats}
            floats = [n for n, kind in kinds.items() if kind.is_floating_point]
            largest = max(floats, key=lambda n: torch.Size(self.source.shape(n)).numel(), default=None)
            self._common = None if largest is None else kinds[largest]
        return self._common or (old.dtype if isinstance(old, QuantLinear) else old.weight.dtype)


def fitting_bias(packed: PackedLinear, wanted: bool, name: str) -> Tensor | None:
    """The bias of the files for a layer that has one in the model, or None. CheckpointError where only one of both has it."""
    # some GPTQ writers give every layer one, of zeros
    there = packed.bias is not None and (wanted or bool(packed.bias.any()))
    if there != wanted:
        raise CheckpointError(f"layer {name!r} has a bias in {'the files' if there else 'the model'} only")
    return packed.bias if there else None


def run_time_scales(packed: PackedLinear, dtype: torch.dtype, name: str) -> Tensor:
    """The scales in fp16 or bf16, which is what the kernels read: exactly where possible.

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
