"""AwqConfig: what to do with a model, validated when it is made."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from .checks import SCALE_DTYPES, check_values, checked_selectors
from .names import read_fields
from .patterns import REGEX, fits

# Pattern of a module's name (see ``patterns.fits``), or a function of the name and the module.
Selector = str | Callable[[str, nn.Module], bool]
# What ``per_layer`` may set: what concerns one Linear alone.
LAYER_FIELDS = (
    "method",
    "bits",
    "group_size",
    "symmetric",
    "scale_dtype",
    "clip",
    "act_order",
    "damping",
    "refine",
    "bias_correction",
    "packed",
)

# What ``head`` sets for the output layer. At 8 bits rounding alone leaves a fifth of the best error at 4 bits
# (docs/research.md, "The output layer"), and a scale would have to be searched, and divided by in every step.
_HEAD_FIELDS: dict[str, dict[str, Any]] = {
    "float": {},
    "int4": {"bits": 4},
    "int8": {"bits": 8, "method": "rtn"},
}


C = TypeVar("C", bound=type)


def _understanding(cls: C) -> C:
    """Let a dataclass take AutoAWQ's names for its fields too, and answer a mistyped one with the nearest."""
    generated = cls.__init__

    @functools.wraps(generated)
    def init(self: Any, *args: Any, **given: Any) -> None:
        fields, placed = read_fields(given, _names(cls)), _names(cls)[: len(args)]
        if "effort" in given:  # what is given by position counts too
            fields = {name: value for name, value in fields.items() if name not in placed or name in given}
        generated(self, *args, **fields)

    cls.__init__ = init
    return cls


def _names(cls: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(cls)]


@_understanding
@dataclass(frozen=True)
class AwqConfig:
    """Settings of :func:`awq_ext.quantize`. Frozen; a bad value raises TypeError or ValueError naming field, value and choices.

    AutoAWQ's names (w_bit, q_group_size, zero_point, version, modules_to_not_convert) are understood too.

    effort: "fast", "balanced" or "best", a choice of several fields by the time that they take: ``AwqConfig(effort="best")``. A
        field that is given beside it counts. It is no field itself: ``to_dict()`` has what it stands for (``config/effort.py``).

    What is quantized:

    bits: 4 or 8, or 2 to 8 with ``packed=False``.
    group_size: input channels that share one scale and zero, -1 for the whole row; a short last group is fine.
    head: the output layer of language models (what ``get_output_embeddings()`` returns, and what is called ``lm_head``): "float"
        leaves it as it is, "int4" quantizes it like the other layers, "int8" rounds it to nearest in 8 bits. It has 4 or 8 bits
        whatever ``bits`` says, and all else from the other fields; a pattern of ``per_layer`` that fits its name comes first.
        A weight that it shares with the embedding stays there in float, and the two are no longer tied. ``quantize_head=True``
        is understood as head="int4".
    skip: layers that stay float, beside the output layer of language models. Each is a pattern of whole layer names (fnmatch, such
        as ``"*.router"``, or a regular expression after ``re:``), or a function of (name, module) that returns a bool. A pattern
        that fits no layer is an error.
    only: the layers that alone are quantized, given like ``skip``; empty for all.
    per_layer: fields for some layers, by name pattern; the first pattern that matches counts. Such as
        ``{"*.down_proj": {"group_size": 32}, "layers.0.*": {"bits": 8}}``.
    min_weights: Linears with fewer weights stay as they are.
    min_tokens: experts that see fewer calibration rows are rounded to nearest, with a warning.
    packed: True makes QuantLinear modules; False leaves nn.Linear with fake-quantized weights, for experiments.

    How it is rounded:

    method: "awq" searches scales and clips; "gptq" rounds with error feedback (arXiv 2210.17323), each channel making up for
        the errors of those before it; "awq+gptq" does so with the weights that AWQ's scales give; "rtn" rounds to nearest.
    symmetric: zero fixed at the middle code instead of one zero per group; scales of either sign.
    scale_dtype: storage type of the scales, "float16" or "bfloat16".
    clip: whether to try smaller weight ranges: True in every layer, False in none, "auto" where that lowers the error of the
        block's output too (queries and keys often lose by it).
    n_grid: steps of alpha in [0, 1] (AWQ, arXiv 2306.00978, equation 5).
    search_rows: output rows of a scale group on which candidates for its scale are ranked, 0 for all. Beyond 2048 input channels
        there are fewer, in proportion. The losses in the report always count every row.
    act_order: error feedback rounds channels by falling second moment, the most important first; False: as they stand.
    damping: what error feedback and refining add to each channel's second moment, as a share of it. With more damping the
        correlations between channels count less: errors on the calibration text grow, errors on other text fall
        (docs/research.md).
    refine: rounds of coordinate descent after rounding, 0 for none. After error feedback they change the scales of weight groups
        and the codes; otherwise there is one round at most, on the scales alone.
    bias_correction: True lets the bias of a Linear take over the mean of its error (arXiv 1906.04721, section 4.2); scales and
        clips are then chosen by the error that is left. Never with "rtn". False leaves biases alone.
    fold: where 1/s goes that makes up for a scale s. "auto": into the norm or Linear before, where a numeric proof shows that
        nothing else changes; elsewhere the layer divides its input at run time. "never": always at run time. "always": never at
        run time; layers before which nothing can take it get no scale. For formats without a place for run-time scales.
    learn_rounding: gradient steps for each block, on the codes and scales of its Linears together, which start at those found
        (arXiv 2309.05516); 0 for none. They lower the error of the block's output behind quantized blocks, two batches a step.
        One batch of eight takes no part, and decides whether what was learned stays. A step takes as long as some eight forwards
        of a batch through the block. Not for several processes. Blocks without gradients keep their codes, with a warning.
    tune_scales: passes over the calibration batches in which the scales of all weight groups are tuned end to end, by gradient
        steps on the model's KL divergence from the float model; 0 for none. Codes and zeros stay. One batch of eight takes no part,
        and the old scales come back unless the divergence there falls. A batch of a pass takes as long as four forwards. Only for
        models that return logits for every token id and can be differentiated: others are left untuned, with a note in the report.
        Text unlike all calibration batches may lose by it, above all with few of them (docs/research-notes-tuning.md).

    How it is calibrated:

    seq_len: window length in tokens when calibration samples are texts.
    builtin_text: whether the texts that ship with the package are calibrated on too, beside those given (``calibration/texts``: a
        small mix of languages, code and data). It helps on text unlike the calibration text (docs/research-notes-tuning.md). Only
        where ``tokenizer`` is given and batches are token ids alone: otherwise the report notes that it was left out.
    random_tokens: further calibration batches, of random tokens, as a share of the number of those given. They help error
        feedback on text unlike the calibration text (docs/research.md). Only for models that read token ids and have
        ``get_input_embeddings()``. None: 0.25 with error feedback, otherwise 0.
    generated_tokens: likewise, batches of text that the model writes itself. Only for decoders that are called like those of
        transformers (``past_key_values``, ``use_cache``). None: 0.25 with error feedback, unless ``builtin_text`` takes
        their place; otherwise 0.
    objective: how much a Linear's error on a calibration row counts. "layer": all rows alike. "model": each row has an importance
        weight, which says how strongly the model's output reacts to errors there; a backward of the whole model finds it
        (``calibration/importance.py``). None: "model" with error feedback, if the model returns logits for every token id and can
        be differentiated; otherwise "layer".
    weighed_batches: how many batches get that backward (of token ids, one window of each). All other rows get the mean weight of
        their position in a window. 0: all batches, and each row has its own weight. That comes closer still to the float model, and
        takes as much time as all the rest.
    propagate: what a block is calibrated on: the outputs of the "float" or of the "quantized" blocks before it.
    """

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"
    n_grid: int = 20
    search_rows: int = 512
    clip: bool | str = "auto"
    act_order: bool = True
    damping: float = 1.0
    refine: int = 1
    bias_correction: bool = True
    fold: str = "auto"
    propagate: str = "float"
    objective: str | None = None
    weighed_batches: int = 4
    builtin_text: bool = False
    random_tokens: float | None = None
    generated_tokens: float | None = None
    learn_rounding: int = 0
    tune_scales: int = 0
    packed: bool = True
    skip: tuple[Selector, ...] = ()
    only: tuple[Selector, ...] = ()
    min_tokens: int = 32
    min_weights: int = 0
    per_layer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    seq_len: int = 512
    head: str = "float"

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("skip", "only"):
            object.__setattr__(self, name, checked_selectors(name, getattr(self, name)))
        self._check_per_layer()

    def _check_per_layer(self) -> None:
        if not isinstance(self.per_layer, Mapping):
            raise TypeError(
                f"AwqConfig.per_layer={self.per_layer!r}: a dict of name pattern -> dict of fields is needed"
            )
        own = {}
        for pattern, fields in self.per_layer.items():
            if not isinstance(pattern, str) or not isinstance(fields, Mapping):
                raise TypeError(
                    f"AwqConfig.per_layer[{pattern!r}]={fields!r}: a name pattern -> dict of fields is needed"
                )
            checked_selectors("per_layer", (pattern,))
            own[pattern] = self._fields_of_layer(pattern, fields)
        object.__setattr__(self, "per_layer", own)

    def _fields_of_layer(self, pattern: str, given: Mapping[str, Any]) -> dict[str, Any]:
        where = f"AwqConfig.per_layer[{pattern!r}]"
        try:
            fields = read_fields(given, _names(type(self)))
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
        if others := sorted(set(fields) - set(LAYER_FIELDS)):
            raise ValueError(f"{where} sets {', '.join(others)}: one layer can have its own {', '.join(LAYER_FIELDS)}")
        try:
            replace(self, per_layer={}, **fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        return fields

    @property
    def searches_scale(self) -> bool:
        """Whether the method multiplies channels by AWQ's scales."""
        return "awq" in self.method.split("+")

    @property
    def uses_gptq(self) -> bool:
        """Whether the method rounds with error feedback."""
        return "gptq" in self.method.split("+")

    @property
    def random_share(self) -> float:
        """``random_tokens``, or what stands for None."""
        return self._share(self.random_tokens)

    @property
    def generated_share(self) -> float:
        """``generated_tokens``, or what stands for None."""
        return 0.0 if self.builtin_text and self.generated_tokens is None else self._share(self.generated_tokens)

    def _share(self, given: float | None) -> float:
        return (0.25 if self._uses_gptq_anywhere else 0.0) if given is None else given

    @property
    def weighs_rows(self) -> bool:
        """Whether ``objective``, or what stands for None, is "model"."""
        return self._uses_gptq_anywhere if self.objective is None else self.objective == "model"

    @property
    def _uses_gptq_anywhere(self) -> bool:
        used = (self, *(replace(self, per_layer={}, **fields) for fields in self.per_layer.values()))
        return any(one.uses_gptq for one in used)

    @property
    def corrects_bias(self) -> bool:
        """Whether biases take over the mean of the error; plain rounding stays plain."""
        return self.bias_correction and self.method != "rtn"

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """scale_dtype as a torch dtype."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def quantizer(self) -> dict[str, Any]:
        """The arguments that every quantizing kernel takes."""
        return {
            "group_size": self.group_size,
            "bits": self.bits,
            "symmetric": self.symmetric,
            "scale_dtype": self.torch_scale_dtype,
        }

    def for_layer(self, name: str) -> AwqConfig:
        """The settings of the layer called ``name``: these, with the fields of the first matching ``per_layer`` pattern."""
        for pattern, fields in self.per_layer.items():
            if fits(pattern, name):
                return replace(self, per_layer={}, **fields)
        return self

    def with_heads(self, names: Iterable[str]) -> AwqConfig:
        """These settings with what ``head`` means for the output layers called ``names``, before all other of ``per_layer``."""
        heads = {}
        for name in names:
            own = next((fields for pattern, fields in self.per_layer.items() if fits(pattern, name)), {})
            heads[REGEX + re.escape(name)] = {**_HEAD_FIELDS[self.head], **own}
        return replace(self, per_layer={**heads, **self.per_layer})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; a function among ``skip`` or ``only`` becomes its name in brackets."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {name: [_named(one) for one in values[name]] for name in ("skip", "only")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AwqConfig:
        """Inverse of :meth:`to_dict`, and reader of AutoAWQ's dict; an unknown field raises ValueError."""
        try:
            fields = read_fields(values, _names(cls))
        except TypeError as error:
            raise ValueError(str(error)) from None
        return cls(**fields)


def understood(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate names of settings as AwqConfig does; TypeError for one it does not know."""
    return read_fields(given, _names(AwqConfig))


def configured(config: AwqConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> AwqConfig:
    """``config`` (a dict: its fields, or AutoAWQ's; None: the defaults) with some fields set anew. TypeError for anything else."""
    if isinstance(config, Mapping):
        config = AwqConfig.from_dict(config)
    if not isinstance(config, (AwqConfig, type(None))):
        raise TypeError(f"config is a {type(config).__name__}: an AwqConfig or a dict of its fields is needed")
    return replace(config or AwqConfig(), **understood(overrides))


def _named(selector: Selector) -> str:
    return selector if isinstance(selector, str) else f"<{getattr(selector, '__qualname__', repr(selector))}>"
