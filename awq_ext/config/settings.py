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

    AutoAWQ's names (w_bit, q_group_size, zero_point, version, modules_to_not_convert) are understood too. docs/guides/reference.md
    has a table of all fields: each field's first sentence here, its type and its default.

    effort: "fast", "balanced" or "best": several fields at once, chosen by the time that they take. A field that is given beside
        it overrides it. An effort is an argument of AwqConfig, not a field: ``to_dict()`` has the fields that it stands for
        (``config/effort.py``).

    What is quantized:

    bits: bits of a weight: 4 or 8, or 2 to 8 with ``packed=False``.
    group_size: input channels that share one scale and one zero; -1 is the whole row. A short last group is fine.
    head: whether the output layer of language models is quantized, and to how many bits. That layer is what
        ``get_output_embeddings()`` returns, and what is called ``lm_head``. "float" leaves it as it is, "int4" quantizes it like
        the other layers, "int8" rounds it to nearest in 8 bits. ``bits`` does not apply to it, all other fields do. A pattern of
        ``per_layer`` that fits its name overrides both.
        A weight that it shares with the embedding stays there in float, and the two are no longer tied. ``quantize_head=True``
        is understood as head="int4".
    skip: layers that stay float, beside the output layer of language models. Each is a pattern of whole layer names (fnmatch, such
        as ``"*.router"``, or a regular expression after ``re:``), or a function of (name, module) that returns a bool. A pattern
        that fits no layer is an error.
    only: the only layers that are quantized; empty is all. Given like ``skip``.
    per_layer: other fields for some layers, by name pattern. The first pattern that fits counts. An example:
        ``{"*.down_proj": {"group_size": 32}, "layers.0.*": {"bits": 8}}``.
    min_weights: Linears with fewer weights than this stay float.
    min_tokens: experts that see fewer calibration rows than this are rounded to nearest, with a warning.
    packed: True makes QuantLinear modules; False leaves nn.Linear with fake-quantized weights, for experiments.

    How it is rounded:

    method: how scales and codes are found: by AWQ, GPTQ, both, or rounding to nearest. "awq" searches scales and clips. "gptq"
        rounds with error feedback (arXiv 2210.17323): each channel makes up for the errors of those before it. "awq+gptq" does
        that with weights multiplied by AWQ's scales. "rtn" rounds to nearest.
    symmetric: whether the zero is the middle code of every group, with scales of either sign; otherwise each group has a zero of
        its own.
    scale_dtype: dtype in which the scales are stored.
    clip: whether smaller weight ranges are tried. True tries them in every layer, False in none; "auto" keeps them only where they
        also lower the error of the block's output (queries and keys often lose by them).
    n_grid: steps of alpha from 0 to 1 in the search for scales (AWQ, arXiv 2306.00978, equation 5).
    search_rows: output rows of a scale group on which candidates for its scale are ranked; 0 is all. Beyond 2048 input channels
        there are fewer, in proportion. The losses in the report always count every row.
    act_order: whether error feedback rounds the channels with the largest second moments first; otherwise in their own order.
    damping: share of its own second moment that is added to each channel's, in error feedback and refining. With more damping the
        correlations between channels count less: errors on the calibration text grow, errors on other text fall
        (docs/research.md).
    refine: rounds of coordinate descent after rounding; 0 is none. After error feedback they change the scales of weight groups
        and the codes; otherwise there is one round at most, on the scales alone.
    bias_correction: whether the bias of a Linear takes over the mean of its error (arXiv 1906.04721, section 4.2). Scales and clips
        are then chosen by the error that is left. Never with "rtn".
    fold: where the factor 1/s goes that makes up for AWQ's scale s: into the norm or Linear before (folded), or to run time. "auto"
        folds where a numeric proof shows that nothing else changes; elsewhere the layer divides its input at run time. "never"
        always divides at run time. "always" never does; where nothing before a layer can take over 1/s, it gets no scale. For
        formats that cannot store run-time scales.
    learn_rounding: gradient steps for each block that learn the codes and scales of its Linears together; 0 is none. They begin at
        the codes that ``method`` found (arXiv 2309.05516 begins at plain rounding), and lower the error of the block's output.
        The block's inputs come from the quantized blocks before it, and its target is its output in the float model. A step takes
        one batch, and about as long as four of its forwards through the block. One batch of eight is held out: what was learned is
        kept only if the error on it falls. Blocks without gradients keep their codes, with a warning. Several processes cannot
        share this work.
    tune_scales: passes over the calibration batches that tune the scales of all weight groups end to end; 0 is none. They are
        gradient steps on the model's KL divergence from the float model. Codes and zeros stay. One batch of eight is held out: the
        old scales come back unless the divergence on it falls. A batch of a pass takes as long as four forwards. Only for
        models that return logits for every token id and can be differentiated: others are left untuned, with a note in the report.
        Text unlike all calibration batches may lose by it, above all with few of them (docs/research-notes-tuning.md).

    How it is calibrated:

    seq_len: tokens in a window, where calibration samples are texts.
    builtin_text: whether the texts that ship with the package are calibrated on too, beside those given. They are a small mix of
        languages, code and data (``calibration/texts``). They help on text unlike the calibration text
        (docs/research-notes-tuning.md). They need ``tokenizer``, and batches that are token ids alone: otherwise they are left
        out, with a note in the report.
    max_calib_tokens: tokens to calibrate on, at most; 0 is no limit. All windows keep the same share of their beginning, but no
        window is cut below 128 tokens: if they are still too many, evenly spaced ones stay, at least one. If the built-in texts
        take part, half of the limit is theirs, or more where fewer tokens are given. Padding does not count, and padded windows
        stay whole or are left out. Batches that hold more than token ids are not limited. What ``random_tokens`` and
        ``generated_tokens`` add comes on top. Mixtures of experts need more text than other models, as each expert sees a part.
    random_tokens: further calibration batches of random tokens, as a share of those given; None chooses by the method. They help
        error feedback on text unlike the calibration text (docs/research.md). Only for models that read token ids and have
        ``get_input_embeddings()``. None: 0.25 with error feedback, unless ``builtin_text`` takes their place; otherwise 0.
    generated_tokens: further calibration batches of text that the model writes, as a share of those given; None chooses by the
        method. Only for decoders that are called like those of transformers (``past_key_values``, ``use_cache``). None: 0.25 with
        error feedback, unless ``builtin_text`` takes their place; otherwise 0.
    objective: whether all calibration rows count alike, or importance-weighted; None chooses by the method. "layer": a Linear's
        error counts alike on all rows. "model": each row has an importance weight, which says how strongly the model's output
        reacts to errors there; a backward of the whole model finds it (``calibration/importance.py``). None: "model" with error
        feedback, if the model returns logits for every token id and can be differentiated; otherwise "layer".
    weighed_batches: batches whose rows get importance weights by a backward; 0 is all. Of a batch of token ids that is one window.
        All other rows get the mean weight of their position in a window. With 0 each row has its own weight: that comes closer
        still to the float model, and takes as much time as all the rest.
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
    max_calib_tokens: int = 0
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
        return self._share(self.generated_tokens)

    def _share(self, given: float | None) -> float:
        if given is not None:
            return given
        return 0.25 if self._uses_gptq_anywhere and not self.builtin_text else 0.0

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
