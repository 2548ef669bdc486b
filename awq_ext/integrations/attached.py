"""Give quantized Transformers models what their own methods cannot know: how to save int4 layers, and not to resize them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.conversions import is_transformers_model
from ..checkpoints.formats import LAYOUTS
from ..checkpoints.model_source import origin
from ..checkpoints.write import Overwrite, check_target
from ..layers.quant_linear import QuantLinear
from ..modules import input_embeddings, output_embeddings
from ..reporting.readers import DEFAULT_FORMAT, quant_method


class Saver:
    """Stands before Transformers' ``save_pretrained`` in a quantized model, and in all that call it (Trainer, push_to_hub).

    An attribute of the model, which deepcopy and pickle take along. What the layout cannot hold is an error before anything is
    written; the report and the model card are written beside the weights, for which Transformers itself has no place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, overwrite: Overwrite = True, **options: Any) -> Any:
        """See ``transformers.PreTrainedModel.save_pretrained``.

        overwrite: True replaces a quantized checkpoint, as Transformers does; False refuses to; the directory's own path replaces
            float weights too, but never those that the model was loaded from.
        """
        from .quantizer import AwqExtQuantizer

        model = self.model
        save, quantizer = type(model).save_pretrained, getattr(model, "hf_quantizer", None)
        # of a model with adapters only these are saved, and one that was dequantized is an ordinary one
        if not isinstance(quantizer, AwqExtQuantizer) or getattr(model, "_hf_peft_config_loaded", False):
            return save(model, save_directory, *args, **options)
        quantizer.check(model)
        main = options.get("is_main_process", args[0] if args else True)
        if main:  # others may come when it has begun to write
            check_target(Path(save_directory), overwrite, [origin(model)])
        quantizer.folder = Path(save_directory) if main else None
        try:
            return save(model, save_directory, *args, **options)
        finally:
            quantizer.folder = None


class Resizer:
    """Stands before Transformers' ``resize_token_embeddings``, which would fail halfway at an output layer of ints."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
        """See ``transformers.PreTrainedModel.resize_token_embeddings``. RuntimeError where the output layer is quantized."""
        model = self.model
        rows = getattr(input_embeddings(model), "num_embeddings", None)
        resizes = new_num_tokens not in (None, rows) or bool(args) or options.get("pad_to_multiple_of") is not None
        if resizes and isinstance(output_embeddings(model), QuantLinear):
            raise RuntimeError(
                f"resize_token_embeddings({new_num_tokens}): the output layer of this {type(model).__name__} is quantized, and "
                'cannot get other rows: resize the float model and quantize that, or quantize with head="float"'
            )
        return type(model).resize_token_embeddings(model, new_num_tokens, *args, **options)


def attach(model: nn.Module, format: str | None = None) -> None:
    """Prepare all Transformers models in ``model`` that hold int4 layers for their own ``save_pretrained``.

    format: the layout to write; None keeps the one that a model was loaded in, else takes the default.
    """
    parts = [part for part in model.modules() if is_transformers_model(part)]
    parts = [part for part in parts if any(isinstance(module, QuantLinear) for module in part.modules())]
    if not parts:
        return
    from .quantizer import AwqExtConfig, AwqExtQuantizer

    for part in parts:
        before = getattr(part, "hf_quantizer", None)
        if before is not None and not isinstance(before, AwqExtQuantizer):
            continue  # of another tool, whose layers it knows how to save
        kept = None if before is None else before.layout.name
        layout = LAYOUTS[format or kept or DEFAULT_FORMAT]
        # what else belongs there is known when the model is saved
        bits = min(module.bits for module in part.modules() if isinstance(module, QuantLinear))
        config = AwqExtConfig(quant_method=quant_method(layout.name), bits=bits)
        quantizer = AwqExtQuantizer(config)
        quantizer.layout = layout
        part.hf_quantizer, part.config.quantization_config = quantizer, config
        part.save_pretrained, part.resize_token_embeddings = Saver(part), Resizer(part)
