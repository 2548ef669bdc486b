"""Calls of the model: made from calibration samples of any kind, and run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modules import input_embeddings
from ..reporting.warn import warn
from ..undo import interrupt
from .inputs import copy_inputs
from .samples import (
    has_text,
    is_chat,
    is_ids,
    rows_of_columns,
    rows_of_ids,
    rows_of_mapping,
    text_of,
    token_ids,
    unread_file,
)

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """One call ``model(*args, **kwargs)``. ``hint``: what its error message adds if it fails."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hint: str = ""

    @property
    def masks(self) -> list[Tensor]:
        """The [batch, sequence] masks among the keywords, 0 where rows are padding.

        ``attention_mask``, ``decoder_attention_mask`` and the like; and the opposite of torch's ``src_key_padding_mask`` and the
        like, but not of square ones: with ``batch_first=False`` rows are [sequence, batch], which could not be told apart.
        """
        given = {k: v for k, v in self.kwargs.items() if isinstance(v, Tensor) and v.dim() == 2}
        kept = [mask for name, mask in given.items() if name.endswith("attention_mask")]
        padded = [mask for name, mask in given.items() if name.endswith("key_padding_mask")]
        return kept + [mask == 0 for mask in padded if mask.shape[0] != mask.shape[1]]

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

    @property
    def tokens(self) -> int:
        """Number of token ids that a language model reads, padding left out; 0 where none are found."""
        first = self.args[0] if self.args else None
        # a model that reads sound or pictures may write text: then the decoder's ids are all there are
        for ids, mask in (
            (self.kwargs.get("input_ids", first), "attention_mask"),
            (self.kwargs.get("decoder_input_ids"), "decoder_attention_mask"),
        ):
            if isinstance(ids, Tensor) and not ids.is_floating_point():
                kept = self.kwargs.get(mask)
                masked = isinstance(kept, Tensor) and kept.shape == ids.shape
                return int((kept != 0).sum()) if masked else ids.numel()
        return 0

    def of_numbers(self, place: str) -> Call:
        """Return this call; ValueError, naming ``place``, where a tensor in its arguments holds NaN. Inf may stand in a mask."""
        named = [*((f"argument {i}", v) for i, v in enumerate(self.args)), *self.kwargs.items()]
        for name, value in ((name, leaf) for name, given in named for leaf in tree_leaves(given)):
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _FLOATS
            if plain and bool(value.isnan().any()):
                raise ValueError(f"{place} holds NaN ({name}, of shape {tuple(value.shape)}): leave it out or mend it")
        return self

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
    model: nn.Module | None = None,
    scoring: bool = False,
) -> list[Call]:
    """Turn every sample of ``calib_loader`` into a Call with its tensors on ``device``.

    A sample may be a Tensor (one positional argument), a tuple or list (positional arguments), a mapping (keywords), a list of
    token ids, or a text: a str, a list of messages, or a mapping with "text", "messages", "conversations" or "prompt" and
    "completion" (these need ``tokenizer``, and are cut into windows of ``seq_len`` tokens, of which the last may be shorter). Rows
    of token ids get a batch dimension. A mapping of columns, as a tokenizer returns it for several texts, is taken apart into rows.
    inputs: "all"; "first" (only the first element of a tuple, for loaders of (input, label) pairs); or a function applied to each
    sample first.
    model: keywords that its forward does not take, and labels, which no layer needs, are left out, with a warning; ids of one
        dimension get a batch dimension where it reads any. scoring: labels stay, as they may be what is predicted.
    Raises ValueError for an empty loader and for NaN in what is calibrated on, TypeError for samples or settings it cannot use,
    such as the name of a file in place of its text; the loader's own errors pass.
    """
    if not (inputs in ("all", "first") or callable(inputs)):
        raise TypeError(f'inputs={inputs!r}: choose "all", "first" or a function of one sample')
    if isinstance(calib_loader, Mapping):
        calib_loader = rows_of_columns(calib_loader) or _refuse(calib_loader)
    if isinstance(calib_loader, (str, Tensor)) or not isinstance(calib_loader, Iterable):
        _refuse(calib_loader)
    reader = _Reader(tokenizer, seq_len, model, scoring)
    calls: list[Call] = []
    for index, sample in enumerate(calib_loader):
        chosen = inputs(sample) if callable(inputs) else sample
        if inputs == "first" and isinstance(chosen, (tuple, list)):
            chosen = chosen[0]
        place = f"sample {index} of calib_loader"
        for call in reader.calls(chosen, place):
            calls.append(call if scoring else call.of_numbers(place))
    if not calls:
        raise ValueError("calib_loader is empty: at least one sample is needed (a generator can be read only once)")
    reader.tell()
    return [Call(_to(call.args, device), _to(call.kwargs, device)) for call in calls]


def _refuse(calib_loader: Any) -> NoReturn:
    hint = ""
    if isinstance(calib_loader, Mapping):
        hint = "; of a data set with several parts choose one, such as data['train']"
    if unread := unread_file(calib_loader):
        raise TypeError(f"calib_loader={os.fspath(calib_loader)!r} {unread}")
    if isinstance(calib_loader, str):
        hint = ', or "builtin" for the texts that ship with the package'
    raise TypeError(
        f"calib_loader is a {type(calib_loader).__name__}: give an iterable of samples, for one sample [sample]{hint}"
    )


class _Reader:
    """Reads samples for one model, and remembers what it left out of them."""

    def __init__(
        self, tokenizer: Callable[..., Any] | None, seq_len: int, model: nn.Module | None, scoring: bool
    ) -> None:
        self._tokenizer, self._seq_len, self._scoring = tokenizer, seq_len, scoring
        self._takes = {} if model is None else dict(inspect.signature(model.forward).parameters)
        self._reads_ids = model is not None and input_embeddings(model) is not None
        self._left_out: dict[str, None] = {}

    def calls(self, sample: Any, place: str) -> Iterator[Call]:
        """Make the calls of one sample."""
        if unread := unread_file(sample):
            raise TypeError(f"{place}, {os.fspath(sample)!r}, {unread}")
        if isinstance(sample, Mapping) and not self._is_text(sample):
            self._check_row(sample, place)
            yield from (Call(kwargs=self._taken(row)) for row in rows_of_mapping(sample))
        elif isinstance(sample, (str, Mapping)) or is_chat(sample):
            yield from self._windows(sample, place)
        elif isinstance(sample, Tensor):
            row = self._reads_ids and sample.dim() == 1 and sample.dtype in (torch.int32, torch.int64)
            yield Call(args=(sample[None] if row else sample,))
        elif is_ids(sample):
            yield from (Call(args=(batch,)) for batch in rows_of_ids(sample))
        elif isinstance(sample, (tuple, list)):
            yield Call(args=tuple(sample))
        else:
            raise TypeError(f"{place} is a {type(sample).__name__}: give Tensor, tuple, list, dict or str")

    def _is_text(self, row: Mapping[str, Any]) -> bool:
        ids = any(name.endswith("input_ids") for name in row)
        return not ids and not (row.keys() & self._takes.keys()) and has_text(row)

    def _check_row(self, row: Mapping[str, Any], place: str) -> None:
        """Raise TypeError for a row of texts under names that nobody knows."""
        texts = [name for name, value in row.items() if isinstance(value, str) or is_chat(value)]
        if self._takes and texts and not row.keys() & self._takes.keys() and self._reads_ids:
            raise TypeError(
                f"{place} has {', '.join(map(str, row))}: say where its text is, inputs=lambda row: row[{texts[0]!r}]"
            )

    def _windows(self, sample: Any, place: str) -> Iterator[Call]:
        if self._tokenizer is None:
            kind = "a str" if isinstance(sample, str) else "a text"
            raise TypeError(f"{place} is {kind}: pass tokenizer= to turn texts into tokens")
        text, templated = text_of(sample, self._tokenizer, place)
        ids = token_ids(self._tokenizer, text, **({"add_special_tokens": False} if templated else {}))
        for window in ids.split(self._seq_len):
            if len(window):  # an empty text has one empty window
                yield Call(args=(window[None],))

    def _taken(self, row: dict[str, Any]) -> dict[str, Any]:
        """Leave out what the forward does not take, and labels where they only make a loss."""
        takes = self._takes
        anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
        if not takes or (anything and not takes.keys() & row.keys()):
            return row
        kept = {}
        for name, value in row.items():
            if self._scoring and name == "labels":
                kept[name] = value
            elif self._of_no_use(name, row) if name in takes else not (anything and isinstance(value, Tensor)):
                self._left_out[name] = None
            else:
                kept[name] = value
        return kept or row  # of nothing but strange names the model itself complains

    def _of_no_use(self, name: str, row: Mapping[str, Any]) -> bool:
        # encoder-decoders shift labels to get the decoder's input
        makes_input = "decoder_input_ids" in self._takes and not row.keys() & {
            "decoder_input_ids",
            "decoder_inputs_embeds",
        }
        optional = self._takes[name].default is not inspect.Parameter.empty
        return name == "labels" and self._reads_ids and optional and not makes_input

    def tell(self) -> None:
        """Warn, once for all samples, of what was left out."""
        if self._left_out:
            kind, no_labels = (
                ("samples", "") if self._scoring else ("calibration samples", "calibration needs no labels and ")
            )
            warn(
                f"left out of the {kind}, as {no_labels}the model takes nothing{' else' if no_labels else ''} of these names: "
                f"{', '.join(self._left_out)}"
            )


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
