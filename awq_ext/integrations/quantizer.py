"""Do what Transformers asks of a quantizer while it loads and saves a model. Imports transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.fill import take_apart, tell_left_out, tie
from ..checkpoints.formats import CheckpointError, PackedLinear
from ..checkpoints.model_source import ModelSource
from ..checkpoints.quantized_dir import QuantDir
from ..checkpoints.renaming import Renamed
from ..checkpoints.saved import found_report
from ..layers.quant_linear import QuantLinear
from ..standins.expert_linears import ExpertLinears
from ..standins.fused import put_back
from ..standins.tied import keep_untied
from ..undo.journal import Journal
from .attached import stand_before
from .beside import summary_for, write_beside
from .placeholders import JoinedLinear, Placeholder, WholeLinear

_IGNORED = ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing")


class AwqExtConfig(QuantizationConfigMixin):
    """A quantization_config with the very keys and values of config.json."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class AwqExtQuantizer(HfQuantizer):
    """Runs any layout that awq_ext reads.

    layout: the one that was loaded, or that a model quantized in memory is saved in. folder: where the model is being saved.
    """

    folder: Path | None = None
    requires_calibration = True  # quantizing is not done while loading

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        source = QuantDir(_folder(model, checkpoint_files))
        self.layout, self.report = source.layout, found_report(source)
        with torch.device("cpu"):  # row numbers are no tensors of the model, which is being built on the meta device
            self.files = Renamed(source, model)
        with Journal() as journal:
            take_apart(model, self.files, journal)
            keep_untied(model, self.files.layers, journal)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.files.layers:
            if name in modules:
                self._hold_place(model, name)
        absent = [name for name in self.files.layers if name not in modules]
        tell_left_out(model, [*absent, *self.files.left_out], self.files.folder)
        for name in self.files.floats:
            if self.files.runs(name):
                self._hold_place(model, name.removesuffix(".weight"))
        self._hide_from_loader(model)

    def _hold_place(self, model: Any, name: str) -> None:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            what = "no such module" if linear is None else f"a {type(linear).__name__} there"
            raise CheckpointError(f"{self.files.folder} has a quantized layer {name!r}, the model has {what}")
        whole = name in self.files.layers and not self.files.runs(name)
        model.set_submodule(name, (WholeLinear if whole else JoinedLinear)(linear, name, self.files))

    def _hide_from_loader(self, model: Any) -> None:
        """Spare the loader what is not its own: parts of experts that are taken apart, buffers that the model computes."""
        self._ignored = {key: getattr(model, key, None) for key in _IGNORED}
        patterns = {f"^{re.escape(name)}$" for name in self._beyond_state_dict(model)}
        patterns |= {f"^{re.escape(name)}\\." for name in self.files.dequantized.values()}
        for name, module in model.named_modules():
            if isinstance(module, ExpertLinears):
                module._is_hf_initialized = True
                patterns.add(f"^{re.escape(name.rpartition('.')[0])}\\.")
        absent = {f"^{re.escape(name)}$" for name in self.files.dequantized}
        for key, more in zip(_IGNORED, (patterns, absent), strict=True):
            if more:
                known = self._ignored[key]
                kind = list if known is None else type(known)  # a set in transformers 5
                setattr(model, key, kind([*(known or ()), *more]))

    def _beyond_state_dict(self, model: Any) -> set[str]:
        """Name the buffers that awq_ext.save stores and transformers computes."""
        return (
            set() if self.files.in_memory is None else {n for n, _ in model.named_buffers()} - set(model.state_dict())
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for key, known in self._ignored.items():
            if getattr(model, key, None) != known:
                setattr(model, key, known)
        self._dequantize_weights(model)
        for name, placeholder in [(n, m) for n, m in model.named_modules() if isinstance(m, Placeholder)]:
            layer = placeholder.layer().train(placeholder.training)
            if hook := getattr(placeholder, "_hf_hook", None):  # model on several devices
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layer, hook)
            model.set_submodule(name, layer)
        if self.files.in_memory is not None:  # a directory of awq_ext.save
            tie(model, self.files.in_memory.tied)
        if hasattr(model, "_weight_conversions"):  # transformers has not seen those of layers that it did not read
            known = {tuple(each.source_patterns) for each in model._weight_conversions}
            model._weight_conversions += [each for each in self.files.used if tuple(each.source_patterns) not in known]
        if self.report is not None:
            model.awq_report = self.report
        stand_before(model)
        del self.files, self.report  # lets go of them
        return model

    @torch.no_grad()
    def _dequantize_weights(self, model: Any) -> None:
        """Fill what has a weight in the model and is a quantized layer in the files, but no Linear: routers."""
        for name in self.files.dequantized:
            held, value = model.get_parameter(name), self.files.float_tensor(name)
            if value.shape != held.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(value.shape)} in the files, {tuple(held.shape)} in the model"
                )
            held.copy_(value)

    def check(self, model: Any) -> None:
        """Raise CheckpointError where the model cannot be saved in ``layout``, or by this version of transformers."""
        if not self.is_serializable():
            raise CheckpointError(
                "this version of transformers cannot save quantized models: use "
                f'awq_ext.save_pretrained(model, directory, format="{self.layout.name}")'
            )
        if self.layout.own_writer:
            raise CheckpointError(
                f"transformers cannot write all that readers of the {self.layout.name} layout need: use "
                f'awq_ext.save_pretrained(model, directory, format="{self.layout.name}")'
            )
        summary_for(Renamed(ModelSource(model), model, to_files=True), model, self.layout)

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Make what ``save_pretrained`` writes: the quantized layers in ``layout``, and a config that says so."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of a model with adapters only these are saved
        source = ModelSource(model)
        renamed = Renamed(source, model, to_files=True)
        summary = summary_for(renamed, model, self.layout)
        state = _state_dict(model, source, renamed, lambda layer: self.layout.pack(layer, summary))
        config = self.layout.quantization_config(summary)
        self.quantization_config = model.config.quantization_config = type(self.quantization_config).from_dict(config)
        if self.folder is not None:
            stored = sum(tensor.nbytes for tensor in state.values())
            write_beside(model, self.folder, renamed, self.layout, summary, stored)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return hasattr(HfQuantizer, "get_state_dict_and_metadata")

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.weight.detach()), layer.bias
            model.set_submodule(name, linear.train(layer.training))
        with Journal() as journal:
            put_back(model, journal)
        return model

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: gradients reach the inputs

    @property
    def is_compileable(self) -> bool:
        return True


def _state_dict(
    model: Any, source: ModelSource, renamed: Renamed, pack: Callable[[PackedLinear], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Name tensors so that transformers' own renaming gives the names of ``renamed``: as the model does where it only renames."""
    written: dict[str, tuple[str, dict[str, Tensor]]] = {}  # name -> that in the file, tensors by suffix
    own = set(source.layers)
    for file_name, name in renamed.layers.items():
        given = file_name if renamed.runs(file_name) else name
        written[given] = file_name, pack(renamed.layer(file_name))
    for tensor in renamed.floats:
        if runs := renamed.runs(tensor):
            name = tensor.removesuffix(".weight")
            written[name] = name, {"weight": renamed.float_tensor(tensor)}
            own |= {run.source.removesuffix(".weight") for run in runs}
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in own}
    for given, (file_name, tensors) in written.items():
        for leaf, tensor in tensors.items():
            if renamed.rename(f"{given}.{leaf}") != f"{file_name}.{leaf}":
                raise CheckpointError(
                    f"transformers would not write {given}.{leaf} as {file_name}.{leaf}: use awq_ext.save_pretrained"
                )
            state[f"{given}.{leaf}"] = tensor
    return state


def _folder(model: Any, checkpoint_files: Any) -> Path:
    """Find where the files of the model lie, in a Hugging Face cache too."""
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    name = getattr(model.config, "name_or_path", "")
    if os.path.isdir(name):
        return Path(name)
    raise CheckpointError(
        f"the files of {name!r} cannot be found: this version of transformers does not pass their place on. Give a directory"
    )
