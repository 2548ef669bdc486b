"""Give quantized Transformers models what their own methods cannot know: how to save int4 layers, and not to resize them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..checkpoints.atomic_directory import out_of_the_way
from ..checkpoints.conversions import is_transformers_model
from ..checkpoints.formats import LAYOUTS
from ..checkpoints.model_source import origin
from ..checkpoints.write import Overwrite, check_target, is_checkpoint_file
from ..layers.quant_linear import QuantLinear
from ..modules import input_embeddings, output_embeddings
from ..reporting.readers import DEFAULT_FORMAT, quant_method
from .hub import PUSH_OPTIONS, push_folder


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
        model = self.model
        save = type(model).save_pretrained
        if not _saved_by_us(model):
            return save(model, save_directory, *args, **options)
        quantizer = model.hf_quantizer
        quantizer.check(model)
        main = options.get("is_main_process", args[0] if args else True)
        hub = None
        if options.pop("push_to_hub", False):
            hub = {name: options.pop(name) for name in (*PUSH_OPTIONS, "repo_id") if name in options}
            hub.setdefault("repo_id", Path(save_directory).name)
            hub["max_shard_size"] = options.get("max_shard_size", "50GB")
        if main:  # others may come when it has begun to write
            check_target(Path(save_directory), overwrite, [origin(model)])
        quantizer.folder = Path(save_directory) if main else None
        try:
            # else Transformers leaves what it does not write itself: an index, the settings of another layout
            with out_of_the_way(Path(save_directory), is_checkpoint_file) if main else nullcontext():
                saved = save(model, save_directory, *args, **options)
        finally:
            quantizer.folder = None
        if hub is not None and main:
            Pusher(model)(**hub)
        return saved


class Pusher:
    """Stands before Transformers' ``push_to_hub`` in a quantized model, which would put a card of its own in place of ours."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, repo_id: str, **options: Any) -> Any:
        """See ``transformers.PreTrainedModel.push_to_hub``. A card that a person wrote stays the repository's."""
        model = self.model
        if not _saved_by_us(model):
            return type(model).push_to_hub(model, repo_id, **options)
        tags = options.pop("tags", None) or []
        tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags)]
        hub = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
        with TemporaryDirectory() as folder:
            options.setdefault("max_shard_size", "50GB")
            model.save_pretrained(folder, **options)  # before anything is made on the hub
            return push_folder(Path(folder), repo_id, tags, **hub)


def _saved_by_us(model: Any) -> bool:
    """Tell whether a model is ours to save: one that was dequantized is ordinary, and of one with adapters only these are saved."""
    from .quantizer import AwqExtQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    return isinstance(quantizer, AwqExtQuantizer) and not getattr(model, "_hf_peft_config_loaded", False)


def stand_before(model: Any) -> None:
    """Put what a quantized model does otherwise before the methods of its Transformers class."""
    model.save_pretrained, model.push_to_hub, model.resize_token_embeddings = (
        Saver(model),
        Pusher(model),
        Resizer(model),
    )


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
        stand_before(part)
