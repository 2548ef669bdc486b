"""The record of a quantization: what was done to each layer, and what it cost."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .new_file import write_new
from .tables import aligned, format_bytes

# calibration tokens: with fewer the statistics of channels change from draw to draw
FEW_TOKENS = 4000


@dataclass
class LayerReport:
    """What became of one nn.Linear.

    Losses are mean squared output errors per calibration row, summed over outputs; None if not measured. Rows count as
    ``AwqConfig.objective`` says, so losses of methods with error feedback cannot be compared with those of others.

    status: "int4", "int8", "fake" (fake-quantized), or "float" (left as it was; ``note`` says why).
    scale: "identity", "plain" or "duo"; alpha its exponent; power: of that scale, under error feedback (otherwise 1).
    applied: "norm" or "linear" (folded into one), "run time", "weights" (fake-quantized weights hold both) or "" (nothing to
    apply). group: the first Linear of the scale group, which shares the scale.
    bias_corrected: whether its bias takes over the mean of its error; ``loss`` is what is left then, ``loss_rtn`` RTN's as it is.
    tail, top_share: of the group's input, for its first Linear: ranked salience (``channels.tail``), and the part of the top 1 %.
    """

    name: str
    in_features: int
    out_features: int
    status: str
    method: str = ""
    bits: int = 0
    group_size: int = 0
    group: str = ""
    scale: str = ""
    alpha: float | None = None
    power: float = 1.0
    applied: str = ""
    clipped: bool = False
    loss_rtn: float | None = None
    loss: float | None = None
    tokens: int = 0
    bias_corrected: bool = False
    note: str = ""
    tail: list[float] = field(default_factory=list)
    top_share: float | None = None


@dataclass
class BlockReport:
    """What became of one block, measured on the first calibration batch.

    fold_error: relative error of its float output once folds were applied; output_error: of its quantized output. note: why its
    folds were given up, or its rounding was not learned, if so.
    """

    name: str
    fold_error: float | None = None
    output_error: float | None = None
    note: str = ""


@dataclass
class AwqReport:
    """The record of one :func:`awq_ext.quantize` call; ``print(model.awq_report)`` shows it as a table.

    model: the name of the model (of its directory, or on the hub), or else of its class; date: in UTC, as ISO 8601 has it;
    versions: of awq_ext, torch and transformers; command: the call, or the command where one was typed.
    bytes_before, bytes_after: of the model's parameters and buffers, fake-quantized weights as if they were packed.
    calibration_tokens: token ids calibrated on, of the samples; 0 where the model reads none, or all is rounded plainly and they do
        not matter.
    builtin_tokens: of the texts that ship with the package, beside those; where these alone are calibrated on, the same number.
    calibration_seconds: forwards of all batches and streaming statistics, which grow with the calibration set;
    search_seconds: scales, folds, clips, rounding, which do not. tuning_seconds: of ``tune_scales``.
    evaluations: scores by the name of the text, as ``Evaluation.to_dict()`` gives them; quantize() leaves it empty,
        ``save_pretrained(..., evaluations=)``, ``awq-ext quantize --traffic`` and ``awq-ext eval --card`` fill it.
    """

    model: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    parameters: int = 0
    quantized_parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    calibration_tokens: int = 0
    builtin_tokens: int = 0
    seconds: float = 0.0
    calibration_seconds: float = 0.0
    search_seconds: float = 0.0
    tuning_seconds: float = 0.0
    planned_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def share_quantized(self) -> float:
        """Weights quantized / all parameters of the model, in [0, 1]."""
        return self.quantized_parameters / max(self.parameters, 1)

    @property
    def few_tokens(self) -> str:
        """What to say of so few calibration tokens that statistics are unsteady; "" where there are enough, or none are read."""
        seen = self.calibration_tokens + (self.builtin_tokens if self.config.get("builtin_text") else 0)
        if not 0 < seen < FEW_TOKENS:
            return ""
        return (
            f"{seen:,} calibration tokens are few: from about {FEW_TOKENS:,} on the statistics of channels are "
            "steady (32 windows of 512 tokens are usual)"
        )

    def __getitem__(self, name: str) -> LayerReport:
        """The row of the layer called ``name``; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AwqReport:
        """Inverse of :meth:`to_dict`."""
        parts = dict(values)
        parts["layers"] = [LayerReport(**row) for row in parts.get("layers", [])]
        parts["blocks"] = [BlockReport(**row) for row in parts.get("blocks", [])]
        return cls(**parts)

    def to_html(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the report as one self-contained page, with plots; returns its path. Needs the extra ``report``.

        FileExistsError for a file that is there, unless ``overwrite``.
        """
        from .page.render import render

        return write_new(path, render(self), overwrite)

    def summary(self) -> str:
        """Say in one line what became of the model."""
        done = [layer for layer in self.layers if layer.status != "float"]
        improved = sum(1 for r in done if r.loss is not None and r.loss_rtn is not None and r.loss < r.loss_rtn)
        return (
            f"{len(done)} of {len(self.layers)} Linears quantized ({self.share_quantized:.1%} of all parameters), "
            f"{improved} with less output error than RTN, in {self.seconds:.1f} s, "
            f"peak memory {format_bytes(self.peak_memory_bytes)} (planned about {format_bytes(self.planned_memory_bytes)})"
        )

    def __str__(self) -> str:
        header = ("layer", "status", "scale", "alpha", "applied", "clip", "loss / RTN's", "tokens", "note")
        rows = [header, *(_cells(layer) for layer in self.layers)]
        return "\n".join(
            [
                *aligned(rows),
                self.summary(),
                *(f"note: {text}" for text in self.notes),
                *(f"warning: {text}" for text in (self.few_tokens, *self.warnings) if text),
            ]
        )


def _cells(layer: LayerReport) -> tuple[str, ...]:
    alpha = "" if layer.alpha is None else f"{layer.alpha:.2f}"
    ratio = ""
    if layer.loss is not None and layer.loss_rtn is not None:
        ratio = f"{layer.loss / layer.loss_rtn:.3f}" if layer.loss_rtn > 0 else "0 / 0"
    clip = "yes" if layer.clipped else ""
    tokens = str(layer.tokens) if layer.tokens else ""
    return (layer.name, layer.status, layer.scale, alpha, layer.applied, clip, ratio, tokens, layer.note)


# Places in a ranking from the largest to the smallest at which tail() reads it; closer together where few channels hold much.
TAIL_PLACES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
