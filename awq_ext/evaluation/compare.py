"""Quantize a model by several methods and score each result on every evaluation text; the model stays as it is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.builtin import NO_TOKENIZER
from ..config import EFFORTS, AwqConfig, understood
from ..forwards.calls import Call, read_calls
from ..forwards.forked import finishing_after_fork
from ..forwards.memory import release_free_memory
from ..forwards.mode import calibration_mode
from ..forwards.outputs import targets_of
from ..forwards.samples import rows_of_columns
from ..layers.sizes import model_bytes
from ..modules import unwrapped
from ..pipeline.quantize import quantize
from ..reporting.progress import Progress, say
from ..reporting.tables import counted
from ..reporting.warn import warn
from ..undo.thread_state import restoring
from .bootstrap import Bootstrap
from .comparison import FLOAT, Comparison, Variant
from .cost import race
from .evaluate import Evaluation, Metric, evaluate
from .shared_copy import SharedCopy

Method = str | Mapping[str, Any] | AwqConfig


@finishing_after_fork
@restoring
def compare(
    model: nn.Module,
    calib: Iterable[Any],
    traffic: Mapping[str, Iterable[Any]],
    methods: Sequence[Method] | Mapping[str, Method] = ("rtn", "awq"),
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    metric: Metric | Mapping[str, Metric] | None = None,
    bootstrap: Bootstrap | None = None,
    speed_seconds: float = 0.5,
    on_model: Callable[[str, nn.Module], object] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Quantize ``model`` by each of ``methods`` and score every result on every text of ``traffic``.

    calib: the calibration samples. traffic: evaluation samples by name, such as {"code": [...]}, like the text that you serve,
        and not those that you calibrate on. All as :func:`awq_ext.quantize` reads them.
    methods: names ("rtn", "awq", ...), dicts of :class:`AwqConfig` fields (a "label" among them is the name in the table), or
        AwqConfig objects; or a dict of these by label. settings: fields that hold for all of them, such as ``group_size=64``.
    metric: as for :func:`awq_ext.evaluate`; None scores next tokens: perplexity, KL divergence and top-1 agreement with ``model``.
    speed_seconds: time for each speed measurement, a method and the float model taking turns; 0 leaves speeds out.
    on_model: called with the label and the model of each row, the float one first, before the model is freed. For example, to let
        it write a text. An error in it counts as an error of the method.

    Returns a :class:`Comparison`: print it, show it in a notebook, ``to_markdown()``, ``to_json()``. A method that fails has its
    error in the table, and a warning; the others go on.

    ``model`` is never written, so an error or an interrupt cannot harm it either: each method works on a copy that shares
    its matrices, one at a time. Peak memory is what quantizing the model in place takes. Raises TypeError or ValueError for
    unusable arguments before any work, RuntimeError if every method failed.
    """
    if not isinstance(traffic, Mapping) or not traffic:
        raise TypeError('traffic: a dict of loaders by name is needed, such as {"code": [...], "json": [...]}')
    settings = understood(settings)
    shared_config = AwqConfig(**settings)
    configs = read_methods(methods, settings)
    samples = {name: _kept(loader) for name, loader in traffic.items()}
    scoring = {"metric": metric, "tokenizer": tokenizer, "inputs": inputs, "seq_len": shared_config.seq_len}
    run = _Run(unwrapped(model), _kept(calib), samples, {**scoring, "bootstrap": bootstrap}, speed_seconds, on_model)
    reading = {"tokenizer": tokenizer, "inputs": inputs, "blocks": blocks}
    total = (1 + len(configs)) * len(samples) + len(configs)
    with Progress(total, "comparing", "step", progress) as bar:
        if bar.lines:
            ways, texts = counted(len(configs), "method"), counted(len(samples), "text")
            say(
                f"comparing {ways} on {texts}: scores the float model, then quantizes and scores by each method in turn"
            )
        rows = [run.float_row(bar)]
        for label, config in configs.items():
            rows.append(run.attempt(label, config, reading, bar))
            release_free_memory()
    failed = [row for row in rows if row.error]
    if len(failed) == len(configs):
        raise RuntimeError("every method failed: " + "; ".join(f"{row.label}: {row.error}" for row in failed))
    for row in failed:
        warn(f"{row.label} failed: {row.error}")
    if without := [row.label for row in rows if row.report is not None and NO_TOKENIZER in row.report.warnings]:
        warn(f"{', '.join(without)}: {NO_TOKENIZER}")
    return Comparison(_with_float_speeds(rows), list(samples), torch.get_num_threads(), bootstrap or Bootstrap())


def _kept(loader: Iterable[Any]) -> Any:
    """List samples, which are read more than once; what a tokenizer made of several texts becomes rows."""
    if isinstance(loader, Mapping):
        return rows_of_columns(loader) or loader
    return loader if isinstance(loader, (str, Tensor)) else list(loader)


def read_methods(
    methods: Sequence[Method] | Mapping[str, Method], settings: Mapping[str, Any] | None = None
) -> dict[str, AwqConfig]:
    """Read ``methods`` as settings by label. TypeError or ValueError for what is no method, or for two of one label."""
    if isinstance(methods, (str, AwqConfig)) or not isinstance(methods, (Sequence, Mapping)) or not methods:
        raise TypeError(f'methods={methods!r}: a sequence is needed, such as ["rtn", "awq"]')
    labelled = list(methods.items()) if isinstance(methods, Mapping) else [(None, method) for method in methods]
    configs: dict[str, AwqConfig] = {}
    for label, method in labelled:
        name, config = _read_method(method, understood(settings or {}))
        name = label or name
        if name in configs or name == FLOAT:
            raise ValueError(f'methods: the label {name!r} is taken: give another, {{"label": ..., "method": ...}}')
        configs[name] = config
    return configs


def _read_method(method: Method, settings: dict[str, Any]) -> tuple[str, AwqConfig]:
    if isinstance(method, AwqConfig):
        return _label(method.to_dict()), replace(method, **settings)
    if isinstance(method, str):
        return method, AwqConfig(**settings | understood({"effort" if method in EFFORTS else "method": method}))
    if not isinstance(method, Mapping):
        raise TypeError(f"methods: {method!r} is a {type(method).__name__}: give a name, a dict or an AwqConfig")
    try:
        chosen = understood({name: value for name, value in method.items() if name != "label"})
    except TypeError as error:
        raise ValueError(str(error)) from None
    return str(method.get("label") or _label(chosen)), AwqConfig.from_dict(settings | chosen)


def _label(fields: Mapping[str, Any]) -> str:
    """Name a method by itself and by the settings that are not at their default."""
    plain = AwqConfig().to_dict()
    others = [f"{k}={v}" for k, v in fields.items() if k != "method" and v != plain.get(k)]
    return " ".join([str(fields.get("method", plain["method"])), *others])


def _tell(bar: Progress, text: str) -> None:
    """Say beside the bar, or in a line of its own in a file, what comes next."""
    bar.note(text)
    if bar.lines:
        say(text)


@dataclass
class _Run:
    """What one call of compare() works on."""

    model: nn.Module
    calib: list[Any]
    samples: dict[str, list[Any]]
    scoring: dict[str, Any]
    speed_seconds: float
    on_model: Callable[[str, nn.Module], object] | None

    def float_row(self, bar: Progress) -> Variant:
        bar.note(FLOAT)
        evaluations = self._score(FLOAT, self.model, bar)
        return Variant(FLOAT, None, model_bytes(self.model), evaluations=evaluations)

    def attempt(self, label: str, config: AwqConfig, reading: Mapping[str, Any], bar: Progress) -> Variant:
        """Quantize and score by one method; a row with the error if that fails."""
        done = bar.done
        try:
            return self._row(label, config, reading, bar)
        except Exception as error:  # hours of other methods must not be lost with this one
            bar.update(done + 1 + len(self.samples) - bar.done)
            return Variant(label, config.to_dict(), error=f"{type(error).__name__}: {error}")

    def _row(self, label: str, config: AwqConfig, reading: Mapping[str, Any], bar: Progress) -> Variant:
        _tell(bar, f"{label}: quantizing")
        copied = SharedCopy.of(self.model)
        began = time.perf_counter()
        with warnings.catch_warnings(record=True):  # they stand in the report
            warnings.simplefilter("always")
            # in a file, where one method may take an hour, its blocks are counted too
            quantize(copied.module, self.calib, config, progress=bar.lines, **reading)
        seconds = time.perf_counter() - began
        copied.check()
        bar.update()
        _tell(bar, f"{label}: scoring")
        return Variant(
            label,
            config.to_dict(),
            model_bytes(copied.module),
            seconds=seconds,
            simulated=not config.packed,
            evaluations=self._score(label, copied.module, bar),
            # a fake-quantized model computes with float weights: its speed is the float model's
            speeds=self._speeds(copied.module) if config.packed else {},
            report=copied.module.awq_report,
        )

    def _score(self, label: str, module: nn.Module, bar: Progress) -> dict[str, Evaluation]:
        found = {}
        # next-token scores of the float model against itself are known: no divergence, full agreement
        reference = None if module is self.model and self.scoring["metric"] is None else self.model
        for name, loader in self.samples.items():
            found[name] = evaluate(module, loader, reference=reference, **self.scoring)
            bar.update()
        if self.on_model is not None:
            self.on_model(label, module)
        return found

    def _speeds(self, module: nn.Module) -> dict[str, tuple[float, float]]:
        """Measure tokens (or rows) a second of ``module`` and of the float model, in turns, for each kind of call."""
        if self.speed_seconds <= 0:
            return {}
        device = next(module.parameters()).device
        settings = [self.scoring[name] for name in ("tokenizer", "inputs", "seq_len")]
        first = next(iter(self.samples.values()))[:1]
        call = read_calls(first, device, *settings, self.model, scoring=True)[0]
        found = {}
        with calibration_mode(self.model), calibration_mode(module):
            for kind, part in _speed_calls(call).items():
                runners = {m: partial(m, *part.args, **part.kwargs) for m in (module, self.model)}
                took = race(runners, self.speed_seconds)
                ids = targets_of(part)
                count = ids.numel() if ids is not None else _rows(part)
                found[kind] = (count / took[module], count / took[self.model])
        return found


def _speed_calls(call: Call) -> dict[str, Call]:
    """Derive the timed calls from a sample: "windows", the sample itself, and "steps", its first token alone.

    Only a sample of nothing but token ids and masks has the second one.
    """
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    calls = {"windows": call}
    if tensors and all(t.dim() == 2 and not t.is_floating_point() for t in tensors):
        first = lambda value: value[:1, :1] if isinstance(value, Tensor) else value  # noqa: E731
        calls["steps"] = Call(tuple(map(first, call.args)), {name: first(v) for name, v in call.kwargs.items()})
    return calls


def _rows(call: Call) -> int:
    return next((len(v) for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.dim()), 1)


def _with_float_speeds(rows: list[Variant]) -> list[Variant]:
    """Give the float row the best speed that it showed beside any method."""
    timed = {call for row in rows for call in row.speeds}
    best = {call: max(row.speeds[call][1] for row in rows if call in row.speeds) for call in timed}
    return [replace(rows[0], speeds={call: (value, value) for call, value in best.items()}), *rows[1:]]
