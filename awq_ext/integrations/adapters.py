"""Let PEFT put LoRA adapters beside int4 layers. Imports peft."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers.quant_linear import QuantLinear

ALL_LINEAR = "all-linear"


class QuantLoraLinear(lora.Linear):
    """PEFT's adapter beside an int4 layer. Merging is refused: there is no float weight, and rounding would lose it."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise RuntimeError that names the ways out."""
        raise RuntimeError(
            "an adapter cannot be merged into a QuantLinear: keep an adapter beside the layer (save_pretrained and "
            "PeftModel.from_pretrained bring it back, vLLM serves it by --enable-lora), or merge it into the float model and "
            "quantize that: float_model = PeftModel.from_pretrained(float_model, directory).merge_and_unload()"
        )


class QuantLoraModel(lora.LoraModel):
    """PEFT's LoRA, which also knows int4 layers: named by ``target_modules``, or all of them by "all-linear"."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """See ``peft.tuners.tuners_utils.BaseTuner``; PEFT's own "all-linear" sees nn.Linear alone."""
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            config.target_modules = self._all_linear(config, model)
        super().inject_adapter(model, adapter_name, *args, **options)

    def _all_linear(self, config: Any, model: nn.Module) -> set[str] | str:
        """List what PEFT would take, and the int4 layers: all but the output layer, and what is inside of adapters."""
        modules = dict(model.named_modules())
        if not any(isinstance(_base(module), QuantLinear) for module in modules.values()):
            return config.target_modules
        found = {
            name for name, module in modules.items() if isinstance(_base(module), (QuantLinear, nn.Linear, Conv1D))
        }
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            found -= {name for name, module in modules.items() if module is head}
        elif config.task_type == peft.TaskType.SEQ_CLS:
            found -= set(SEQ_CLS_HEAD_NAMES)
        adapted = [f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
        return {name for name in found if not name.startswith(tuple(adapted))}

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        if isinstance(_base(target), QuantLinear):
            return QuantLoraLinear(target, adapter_name, config=lora_config, **options)
        return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **options)


def _base(module: nn.Module) -> nn.Module:
    """Look through adapters that are there already."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def register() -> None:
    """Take over the method LORA in PEFT's public table; what it does with other layers is PEFT's own."""
    peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = QuantLoraModel
