"""Hold a quantized layer's place in a model while transformers reads its files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoints.fill import run_time_scales
from ..checkpoints.formats import CheckpointError, PackedLinear
from ..checkpoints.formats.packed import fitting_bias
from ..checkpoints.renaming import Renamed
from ..layers.quant_linear import QuantLinear
from ..layers.quantized_weight import QuantizedWeight


class Placeholder(nn.Module):
    """Holds the place of ``linear``, which is ``name`` in the model, until its layer can be made from ``files``."""

    def __init__(self, linear: nn.Linear, name: str, files: Renamed) -> None:
        super().__init__()
        self.name = name
        self.files = files
        self._replaces = (linear,)  # in a tuple, else its weight would be expected in the files

    @property
    def linear(self) -> nn.Linear:
        """The model's Linear, on the meta device."""
        return self._replaces[0]

    def layer(self) -> nn.Module:
        """Make what takes its place. CheckpointError if the tensors did not come, are damaged, or do not fit the model."""
        raise NotImplementedError

    def _have_weight(self) -> None:
        """Mark a weight as drawn: some models draw their children's weights by name, but none that is marked."""
        if "weight" not in self._buffers:
            self.weight = torch.empty(0)
            self.weight._is_hf_initialized = True

    def _int4_layer(self, packed: PackedLinear, device: torch.device) -> QuantLinear:
        linear = self.linear
        linear.bias = self._bias(packed)
        scales = run_time_scales(packed, linear.weight.dtype, self.name)
        parts = (part.to(device) for part in (packed.qweight, scales, packed.zeros))
        weight = QuantizedWeight(*parts, packed.in_features, packed.group_size, bits=packed.bits)
        scale = packed.pre_quant_scale
        layer = QuantLinear.from_packed(linear, weight, None if scale is None else scale.to(device))
        held = self.files.in_memory
        layer.compute = packed.compute if held is None else held.layers[self.name][1]
        return layer.to(device)

    def _bias(self, packed: PackedLinear) -> nn.Parameter | None:
        linear = self.linear
        found, expected = (packed.in_features, packed.out_features), (linear.in_features, linear.out_features)
        if found != expected:
            raise CheckpointError(f"layer {self.name!r} is {found} in the files, {expected} in the model")
        bias = fitting_bias(packed, linear.bias is not None, self.name)
        return None if bias is None else nn.Parameter(bias.to(linear.weight.dtype))

    def _place(self, tensors: dict[str, Tensor]) -> torch.device:
        """Find the device where the model wants the layer."""
        if lacking := [leaf for leaf, tensor in tensors.items() if tensor.is_meta]:
            raise CheckpointError(
                f"{self.name}.{lacking[0]} was not loaded: quantized layers cannot be kept on disk (device_map)"
            )
        return next(iter(tensors.values())).device


class WholeLinear(Placeholder):
    """For one layer of the files: its tensors as buffers, which transformers fills."""

    def __init__(self, linear: nn.Linear, name: str, files: Renamed) -> None:
        super().__init__(linear, name, files)
        for leaf, tensor in files.empty_tensors(name).items():
            self.register_buffer(leaf, tensor)
        self._have_weight()

    def layer(self) -> QuantLinear:
        """See :class:`Placeholder`."""
        tensors = dict(self.named_buffers())
        device = self._place(tensors)
        return self._int4_layer(self.files.layer_of(self.name, tensors), device)


class JoinedLinear(Placeholder):
    """For rows of several layers of the files, or of their float weights, read when transformers is done with the others.

    Its one buffer is of the layer's size and nobody's: by it device maps are planned and the device is known.
    """

    def __init__(self, linear: nn.Linear, name: str, files: Renamed) -> None:
        super().__init__(linear, name, files)
        size = linear.weight.nbytes if name not in files.layers else linear.weight.numel() * files.bits(name) // 8 + 1
        self.register_buffer("room", torch.empty(size, dtype=torch.uint8, device="meta"), persistent=False)
        self._have_weight()

    def layer(self) -> nn.Module:
        """See :class:`Placeholder`; a Linear where the weight is float."""
        device = self._place(dict(self.named_buffers()))
        if self.name in self.files.layers:
            return self._int4_layer(self.files.layer(self.name), device)
        linear, old = self.linear, self.linear.weight
        weight = self.files.float_tensor(f"{self.name}.weight")
        if weight.shape != old.shape:
            raise CheckpointError(
                f"{self.name}.weight has shape {tuple(weight.shape)} in the files, {tuple(old.shape)} in the model"
            )
        linear.weight = nn.Parameter(weight.to(device, old.dtype), requires_grad=old.requires_grad)
        return linear
