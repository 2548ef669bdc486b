"""What transformers' own conversions do to the names and tensors of a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn


def transformers() -> Any:
    """The package; ImportError with one clear sentence without it."""
    try:
        import transformers as package
    except ImportError as error:
        raise ImportError(
            "Hugging Face directories need transformers, which is not installed: pip install 'awq-ext[hf]', "
            "or build the model yourself and use awq_ext.load(model, directory)"
        ) from error
    return package


def is_transformers_model(model: nn.Module) -> bool:
    """Without importing transformers."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__) and hasattr(model, "config")


def weight_conversions(model: nn.Module, to_files: bool) -> tuple[list[Any], list[Any]]:
    """Renamings and converters of a model's class, for this direction; none before transformers 5 and for other models."""
    if not is_transformers_model(model):
        return [], []
    try:
        from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    if to_files:
        # what the model came from, if transformers loaded it; else the class's own, of which a prefix may be none of its files'
        known = getattr(model, "_weight_conversions", None)
        if known is None:
            known = [
                t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)
            ]
        found = [transform.reverse_transform() for transform in reversed(known)]
    else:
        found = get_model_conversion_mapping(model)
    return (
        [transform for transform in found if isinstance(transform, WeightRenaming)],
        [transform for transform in found if isinstance(transform, WeightConverter)],
    )
