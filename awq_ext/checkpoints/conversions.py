"""Do to the names and tensors of a checkpoint what transformers' own conversions do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..layers.quant_linear import QuantLinear
from ..standins.expert_linears import ExpertLinears


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


def tensor_names(model: nn.Module) -> set[str]:
    """Name all parameters and buffers; weights that are quantized and experts that were taken apart by the names they had."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            names.add(f"{name}.weight")
        elif isinstance(module, ExpertLinears):
            names.add(name)
    return names


class Conversions:
    """Translate names and tensors as transformers does, from files to a model or (to_files) back; None: not at all.

    A name is renamed, or fits a pattern of a converter, which makes one tensor or several of all that fit its patterns. From
    files, the prefix of the base model ("model.") is added or taken away where only that finds the tensor.
    """

    def __init__(self, model: nn.Module | None, to_files: bool) -> None:
        renamings, converters = ([], []) if model is None else _weight_conversions(model, to_files)
        self._renamings, self._converters, self._to_files = renamings, converters, to_files
        from_files = model is not None and is_transformers_model(model) and not to_files
        self._known = tensor_names(model) if from_files else None
        self._prefix = getattr(model, "base_model_prefix", "") if from_files else ""

    def rename(self, name: str) -> str:
        """Apply the renamings alone."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def find(self, name: str) -> tuple[str, str | None]:
        """Give the new name, and the pattern of the converter that it fits. To files, renaming comes last, after conversion."""
        if self._to_files:
            new, pattern = self._converted(name)
            return (self.rename(new) if pattern is None else new), pattern
        new, pattern = self._converted(self.rename(name))
        new = self._prefixed(new)
        if self._known is not None and new not in self._known and name in self._known:
            return self._prefixed(name), None
        return new, pattern

    def find_weight(self, layer: str) -> tuple[str, str | None]:
        """Do the same for the weight of a quantized layer.

        In files the layer is called like its weight, without ``.weight`` where that is called so. Some weights are not: to files,
        ``proj.weight`` may become ``proj``, and from files the whole name is the weight's.
        """
        new, pattern = self.find(f"{layer}.weight")
        if pattern is None and self.lacks(new):
            whole = self.find(layer)
            if not self.lacks(whole[0]):
                return whole
        return new, pattern

    def lacks(self, name: str) -> bool:
        """Tell whether the model has no tensor of this name, given by :meth:`find`."""
        return self._known is not None and name not in self._known

    def _converted(self, name: str) -> tuple[str, str | None]:
        for converter in self._converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, pattern
        return name, None

    def _prefixed(self, name: str) -> str:
        """Add or take away the base model's prefix, as transformers does for files of a base model, or for one."""
        if not self._prefix or self._known is None:
            return name
        without, longer = name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"
        if without != name and without in self._known:
            return without
        return longer if longer in self._known else name

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
