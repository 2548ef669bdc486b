"""What Transformers asks of a quantizer while it loads and saves a model. Imports transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .export import summarize
from .formats import CheckpointError, PackedLinear
from .placement import run_time_scales
from .pretrained import ModelSource, float_linears
from .qlinear import QuantLinear
from .quantdir import QuantDir
from .renaming import Renamed


class AwqExtConfig(QuantizationConfigMixin):
    """A quantization_config with the very keys and values of config.json."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class WaitingLinear(nn.Module):
    """A quantized layer while its files are read: their tensors as buffers, and the Linear of the model that it replaces."""

    def __init__(self, linear: nn.Linear, source: QuantDir, file_name: str) -> None:
        super().__init__()
        self.file_name = file_name
        self._replaces = (linear,)  # in a tuple, else its weight would be expected in the files
        for leaf, tensor in source.layers[file_name].items():
            shape, dtype = source.shards.shape(tensor), source.shards.dtype(tensor)
            self.register_buffer(leaf, torch.empty(shape, dtype=dtype, device="meta"))

    def int4_layer(self, source: QuantDir) -> QuantLinear:
        """What takes its place. CheckpointError if the tensors did not come, are damaged, or do not fit the model."""
        tensors = dict(self.named_buffers())
        if lacking := [leaf for leaf, tensor in tensors.items() if tensor.is_meta]:
            raise CheckpointError(
                f"{self.file_name}.{lacking[0]} was not loaded: quantized layers cannot be kept on disk (device_map)"
            )
        device = next(iter(tensors.values())).device
        try:
            packed = source.layout.unpack(
                {leaf: tensor.cpu() for leaf, tensor in tensors.items()}, source.settings.of(self.file_name)
            )
        except CheckpointError as error:
            raise CheckpointError(f"{source.folder}: layer {self.file_name}: {error}") from None
        (linear,) = self._replaces
        linear.bias = self._bias(linear, packed)
        parts = (packed.qweight, run_time_scales(packed, linear.weight.dtype, self.file_name), packed.zeros)
        scale = packed.pre_quant_scale
        return QuantLinear.from_packed(
            linear, *(part.to(device) for part in parts), packed.group_size, None if scale is None else scale.to(device)
        ).to(device)

    def _bias(self, linear: nn.Linear, packed: PackedLinear) -> nn.Parameter | None:
        found, expected = (packed.in_features, packed.out_features), (linear.in_features, linear.out_features)
        if found != expected:
            raise CheckpointError(f"layer {self.file_name!r} is {found} in the files, {expected} in the model")
        # some GPTQ writers give every layer a bias of zeros
        there = packed.bias is not None and (linear.bias is not None or bool(packed.bias.any()))
        if there != (linear.bias is not None):
            raise CheckpointError(
                f"layer {self.file_name!r} has a bias in {'the files' if there else 'the model'} only"
            )
        return nn.Parameter(packed.bias.to(linear.weight.dtype)) if there else None


class AwqExtQuantizer(HfQuantizer):
    """Runs any layout that awq_ext reads; ``layout`` is the one that was loaded."""

    requires_calibration = True  # quantizing is not done while loading

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.source = QuantDir(_folder(model, checkpoint_files))
        self.layout = self.source.layout
        for name, file_name in Renamed(self.source, model).layers.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                what = "no such module" if linear is None else f"a {type(linear).__name__} there"
                raise CheckpointError(f"{self.source.folder} has a quantized layer {name!r}, the model has {what}")
            model.set_submodule(name, WaitingLinear(linear, self.source, file_name))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, waiting in [(n, m) for n, m in model.named_modules() if isinstance(m, WaitingLinear)]:
            layer = waiting.int4_layer(self.source).train(waiting.training)
            if hook := getattr(waiting, "_hf_hook", None):  # model on several devices
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layer, hook)
            model.set_submodule(name, layer)
        del self.source  # lets go of the files
        return model

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the quantized layers in ``layout``, and a config that says so."""
        source = ModelSource(model)
        renamed = Renamed(source, model, to_files=True)
        summary = summarize(renamed, self.layout, renamed.linears(float_linears(model)))
        # under the model's names: Transformers renames what it writes
        own = tuple(f"{name}." for name in source.layers)
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}
        for name in source.layers:
            packed = self.layout.pack(source.layer(name), summary)
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.items()}
        config = self.layout.quantization_config(summary)
        self.quantization_config = model.config.quantization_config = type(self.quantization_config).from_dict(config)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return hasattr(HfQuantizer, "get_state_dict_and_metadata")

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.weight), layer.bias
            model.set_submodule(name, linear.train(layer.training))
        return model

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: gradients reach the inputs

    @property
    def is_compileable(self) -> bool:
        return True


def _folder(model: Any, checkpoint_files: Any) -> Path:
    """Where the files of the model lie, in a Hugging Face cache too."""
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    name = getattr(model.config, "name_or_path", "")
    if os.path.isdir(name):
        return Path(name)
    raise CheckpointError(
        f"the files of {name!r} cannot be told: this version of transformers does not pass them on, give a directory"
    )
