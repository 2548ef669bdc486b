"""Calibration samples of any kind -> the calls that are made on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..undo import interrupt
from .inputs import copy_inputs


@dataclass(frozen=True)
class Call:
    """One call ``model(*args, **kwargs)`` and the masks that tell which of its rows count; ``hint``: what to do if it fails."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hint: str = ""

    @property
    def masks(self) -> list[Tensor]:
        """[batch, sequence] masks among the keywords: ``attention_mask``, ``decoder_attention_mask`` and the like."""
        found = [v for k, v in self.kwargs.items() if k.endswith("attention_mask") and isinstance(v, Tensor)]
        return [mask for mask in found if mask.dim() == 2]

    def row_mask(self, x: Tensor) -> Tensor | None:
        """The bool mask that fits the rows of ``x`` [..., K]: same leading shape (ones apart), or as many rows once flattened."""
        rows = [size for size in x.shape[:-1] if size != 1]
        for mask in self.masks:
            if rows == [size for size in mask.shape if size != 1] or (x.dim() == 2 and x.shape[0] == mask.numel()):
                return (mask != 0).view(x.shape[:-1])
        return None

    @property
    def elements(self) -> int:
        """Elements of all tensors: the measure by which batches of different length are compared."""
        return sum(v.numel() for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

    def on_copies(self, hint: str = "") -> Call:
        """The same call with copies of its arguments, which a model that writes its input may change; ``hint`` is added."""
        args, kwargs = copy_inputs((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, hint=self.hint + hint)


def read_calls(
    calib_loader: Iterable[Any],
    device: torch.device,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    seq_len: int = 512,
) -> list[Call]:
    """Every sample of ``calib_loader`` as a Call, tensors on ``device``.

    Samples: Tensor (one positional argument), tuple or list (positional), mapping (keywords), str (needs ``tokenizer``; cut
    into windows of ``seq_len`` tokens, the rest kept). inputs: "all", "first" (only the first element of a tuple: loaders
    of (input, label) pairs), or a function applied to each sample first.
    Raises ValueError for an empty loader, TypeError for samples or settings it cannot use; the loader's own errors pass.
    """
    if not (inputs in ("all", "first") or callable(inputs)):
        raise TypeError(f'inputs={inputs!r}: choose "all", "first" or a function of one sample')
    if isinstance(calib_loader, (str, Tensor, Mapping)) or not isinstance(calib_loader, Iterable):
        raise TypeError(
            f"calib_loader is a {type(calib_loader).__name__}: give an iterable of samples, for one sample [sample]"
        )
    calls: list[Call] = []
    for index, sample in enumerate(calib_loader):
        chosen = inputs(sample) if callable(inputs) else sample
        if inputs == "first" and isinstance(chosen, (tuple, list)):
            chosen = chosen[0]
        calls.extend(_calls_of(chosen, index, tokenizer, seq_len))
    if not calls:
        raise ValueError("calib_loader is empty: at least one sample is needed (a generator can be read only once)")
    return [Call(_to(call.args, device), _to(call.kwargs, device)) for call in calls]


def _calls_of(sample: Any, index: int, tokenizer: Callable[..., Any] | None, seq_len: int) -> Iterator[Call]:
    if isinstance(sample, str):
        if tokenizer is None:
            raise TypeError(f"sample {index} of calib_loader is a str: pass tokenizer= to turn texts into tokens")
        for window in _token_ids(tokenizer, sample).split(seq_len):
            if len(window):  # an empty text has one empty window
                yield Call(args=(window[None],))
    elif isinstance(sample, Tensor):
        yield Call(args=(sample,))
    elif isinstance(sample, Mapping):
        yield Call(kwargs=dict(sample))
    elif isinstance(sample, (tuple, list)):
        yield Call(args=tuple(sample))
    else:
        raise TypeError(
            f"sample {index} of calib_loader is a {type(sample).__name__}: give Tensor, tuple, list, dict or str"
        )


def _token_ids(tokenizer: Callable[..., Any], text: str) -> Tensor:
    """Token ids [T] from whatever a tokenizer returns: a mapping with input_ids, a Tensor, a list."""
    ids = tokenizer(text)
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    return torch.as_tensor(ids, dtype=torch.long).reshape(-1)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to(v, device) for v in value)
    return value


class CalibrationError(RuntimeError):
    """The model could not run a calibration batch, or ran its blocks in a way that cannot be calibrated."""


def run_call(model: nn.Module, call: Call, index: int) -> Any:
    """``model(*args, **kwargs)``; an exception of the model is re-raised as CalibrationError with the batch's number."""
    interrupt.check()
    try:
        return model(*call.args, **call.kwargs)
    except Exception as error:
        shapes = [tuple(v.shape) for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
        hint = ' For a loader of (input, label) pairs pass inputs="first".' if len(call.args) > 1 else ""
        raise CalibrationError(
            f"the model rejected calibration batch {index} (tensor shapes {shapes}): "
            f"{type(error).__name__}: {error}.{hint}{call.hint}"
        ) from error
