"""Calls of the model: made from calibration samples of any kind, and run."""

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
    """One call ``model(*args, **kwargs)``. ``hint``: what its error message adds if it fails."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hint: str = ""

    @property
    def masks(self) -> list[Tensor]:
        """The [batch, sequence] masks among the keywords: ``attention_mask``, ``decoder_attention_mask`` and the like."""
        found = [v for k, v in self.kwargs.items() if k.endswith("attention_mask") and isinstance(v, Tensor)]
        return [mask for mask in found if mask.dim() == 2]

    def row_mask(self, x: Tensor) -> Tensor | None:
        """Find the bool mask [...] of the rows of ``x`` [..., K] that count; None if there is none, and all do.

        A mask fits if its shape is that of the rows (sizes of 1 apart), or if ``x`` is [rows, K] and it has an entry for each.
        """
        rows = [size for size in x.shape[:-1] if size != 1]
        for mask in self.masks:
            if rows == [size for size in mask.shape if size != 1] or (x.dim() == 2 and x.shape[0] == mask.numel()):
                return (mask != 0).view(x.shape[:-1])
        return None

    @property
    def elements(self) -> int:
        """Number of elements of all tensors, by which batches of different length are compared."""
        return sum(v.numel() for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

    def on_copies(self, hint: str = "") -> Call:
        """Return this call with copies of its arguments, for a model that may write its input; ``hint`` is added to its own."""
        args, kwargs = copy_inputs((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, hint=self.hint + hint)


def read_calls(
    calib_loader: Iterable[Any],
    device: torch.device,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    seq_len: int = 512,
) -> list[Call]:
    """Turn every sample of ``calib_loader`` into a Call with its tensors on ``device``.

    A sample may be a Tensor (one positional argument), a tuple or list (positional arguments), a mapping (keywords), or a str
    (needs ``tokenizer``; cut into windows of ``seq_len`` tokens, of which the last may be shorter). inputs: "all"; "first" (only
    the first element of a tuple, for loaders of (input, label) pairs); or a function applied to each sample first.
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
    """Return the token ids [T] in whatever a tokenizer returns: a mapping with input_ids, a Tensor, a list."""
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
    """Run ``model(*args, **kwargs)``; re-raise the model's own exception as a CalibrationError with the batch's number."""
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
