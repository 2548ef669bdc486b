"""Do to the names and tensors of a checkpoint what transformers' own conversions do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn


def transformers() -> Any:
    """Import transformers; ImportError with one clear sentence without it."""
    try:
        import transformers as package
    except ImportError as error:
        raise ImportError(
            'Hugging Face directories need transformers, which is not installed: pip install "awq-ext[hf]", '
            "or build the model yourself and use awq_ext.load(model, directory)"
        ) from error
    return package


def is_transformers_model(model: nn.Module) -> bool:
    """Tell whether a model is one of transformers, without importing that."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__) and hasattr(model, "config")


class Conversions:
    """Translate names and tensors as transformers does, from files to a model or (to_files) back; None: not at all.

    A name is renamed, or fits a pattern of a converter, which makes one tensor or several of all that fit its patterns.
    """

    def __init__(self, model: nn.Module | None, to_files: bool) -> None:
        renamings, converters = ([], []) if model is None else _weight_conversions(model, to_files)
        self._renamings, self._converters, self._to_files = renamings, converters, to_files

    def rename(self, name: str) -> str:
        """Apply the renamings alone."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def find(self, name: str) -> tuple[str, str | None]:
        """Give the new name, and the pattern of the converter that it fits. To files, renaming comes last, after conversion."""
        if not self._to_files:
            name = self.rename(name)
        for converter in self._converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, pattern
        return (self.rename(name) if self._to_files else name), None

    def convert(self, group: str, tensors: Sequence[tuple[str, str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
        """Let the converter of one group make what it makes of its tensors: (name, pattern that it fits, values)."""
        converter = deepcopy(self._converter(tensors[0][1]))
        for name, pattern, tensor in tensors:
            converter.add_tensor(group, name, pattern, tensor)
        made = converter.convert(group, model=model, config=model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {self.rename(name): tensor for name, tensor in found.items()} if self._to_files else found

    def absent_patterns(self, fitted: Collection[str]) -> list[str]:
        """List the patterns of the same converter that no name has fitted."""
        converter = self._converter(next(iter(fitted)))
        return [pattern for pattern in converter.source_patterns if pattern not in fitted]

    @property
    def used(self) -> list[Any]:
        """The renamings and converters that any name has fitted."""
        return [each for each in (*self._renamings, *self._converters) if each.was_used()]

    def _converter(self, pattern: str) -> Any:
        return next(converter for converter in self._converters if pattern in converter.source_patterns)


def _weight_conversions(model: nn.Module, to_files: bool) -> tuple[list[Any], list[Any]]:
    """Find the renamings and converters of a model's class; none before transformers 5 and for other models."""
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
