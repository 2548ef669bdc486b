"""Measure what quantizing each layer alone costs the model, and choose layers for more bits under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.formats.layout import JOINED
from ..config import AwqConfig, configured
from ..forwards.calls import Call, read_calls, run_call
from ..forwards.forked import finishing_after_fork
from ..forwards.mode import calibration_mode
from ..forwards.outputs import distance_of, float_tensors, logits_of, norm_of, targets_of
from ..kernels.reference import TILE_BITS
from ..modules import unwrapped
from ..pipeline.quantize import quantize
from ..reporting.report import AwqReport
from ..reporting.sizes import group_bits, stored_bits
from ..reporting.tables import Cell, Table, as_text
from ..undo.thread_state import restoring
from .bootstrap import Bootstrap, Estimate, Measure
from .evaluate import window_scores
from .shared_copy import SharedCopy


@dataclass(frozen=True)
class Part:
    """Layers that are quantized together while all others are float: one, or a block's. cost: the measure, with its interval.

    weights: how many; bits: stored ones a weight, scales and zeros counted; float_bits: of its float weights;
    rows: output rows.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    bits: float
    float_bits: int
    cost: Estimate
    rows: int = 0


@dataclass(frozen=True)
class Kept:
    """Layers that are worth more bits: pass ``**kept.settings`` to :func:`awq_ext.quantize`.

    bits: average stored bits of the quantizable weights; cost: what the parts are expected to add up to, after and before.
    """

    names: tuple[str, ...]
    settings: dict[str, Any]
    bits: float
    cost: float
    cost_before: float

    def __str__(self) -> str:
        names = ", ".join(self.names) or "no layer"
        return f"keep {names}: {self.bits:.2f} bits a weight, cost {self.cost_before:.4g} -> {self.cost:.4g} expected"


@dataclass(frozen=True, repr=False)  # its __str__ is what is to be seen
class Sensitivity:
    """What :func:`sensitivity` found: the cost of each part. ``print`` it; :meth:`keep` spends a budget of bits.

    measure: "kl" (mean divergence of the float model's next-token distribution, nats a token) or "output" (squared error of the
    model's output, relative). together: the cost of quantizing everything; the sum of the parts is near it as far as costs add up.
    """

    parts: Sequence[Part]
    measure: str
    together: float
    config: AwqConfig

    def __getitem__(self, name: str) -> Part:
        """The part that holds the layer called ``name``; KeyError if there is none."""
        for part in self.parts:
            if name == part.name or name in part.layers:
                return part
        raise KeyError(name)

    @property
    def total(self) -> float:
        """Sum of the costs of the parts."""
        return sum(part.cost.value for part in self.parts)

    def keep(self, bits: float, upper: int | str = "float", joined: bool = False, whole_rows: bool = False) -> Kept:
        """Choose the parts that save most cost for each extra bit, within ``bits`` stored bits a weight on average.

        upper: what the chosen parts become: "float", or 5 to 8 bits (5 to 7 are fake-quantized: no packed layer has them). The
            cost of ``upper`` bits is estimated: each further bit halves rounding errors, and quarters squared ones.
        joined: choose q, k and v together, and gate and up: vLLM and other servers make one matrix of them, with the same bits.
        whole_rows: with ``upper=8``, the chosen parts get one symmetric scale for each row, as
            ``format="compressed-tensors-w8a8"`` needs it, whatever the groups of all others are.
        Raises ValueError for a budget below what quantizing everything takes.
        """
        if whole_rows and upper != 8:
            raise ValueError(f"whole_rows=True is for layers of 8 bits: give upper=8, not {upper!r}")
        if upper != "float" and (
            isinstance(upper, bool) or not isinstance(upper, int) or not self.config.bits < upper <= 8
        ):
            raise ValueError(f'upper={upper!r}: "float" or a number of bits from {self.config.bits + 1} to 8 is needed')
        weights = sum(part.weights for part in self.parts)
        used = sum(part.bits * part.weights for part in self.parts)
        if bits * weights < used:
            raise ValueError(
                f"bits={bits}: quantizing everything takes {used / weights:.3f} already, scales and zeros counted"
            )
        left = 0.0 if upper == "float" else 0.25 ** (upper - self.config.bits)
        chosen: list[Part] = []
        choices = []
        for parts in _as_served(self.parts) if joined else [[part] for part in self.parts]:
            cost = sum(p.cost.value for p in parts)
            more = sum(p.weights * self._more(p, upper, whole_rows) for p in parts)
            choices.append((cost, more, parts))
        for cost, more, parts in sorted(choices, key=lambda choice: -choice[0] / choice[1]):
            if cost > 0 and used + more <= bits * weights:
                chosen += parts
                used += more
        names = tuple(name for part in chosen for name in part.layers)
        saved = (1 - left) * sum(part.cost.value for part in chosen)
        return Kept(names, self._settings(names, upper, whole_rows), used / weights, self.total - saved, self.total)

    def _more(self, part: Part, upper: int | str, whole_rows: bool) -> float:
        """Count the stored bits that each weight of a part takes more with ``upper``."""
        if upper == "float":
            return part.float_bits - part.bits
        if whole_rows:
            return upper + group_bits(upper) * part.rows / part.weights - part.bits
        own = self.config.bits
        groups = (part.bits - own) / group_bits(own)  # for each weight
        return upper - own + (group_bits(upper) - group_bits(own)) * groups

    def _settings(self, names: Sequence[str], upper: int | str, whole_rows: bool) -> dict[str, Any]:
        patterns = tuple(escape(name) for name in names)
        if upper == "float":
            return {"skip": (*self.config.skip, *patterns)}
        fields = {"bits": upper} | ({} if upper in TILE_BITS else {"packed": False})
        fields |= {"group_size": -1, "symmetric": True} if whole_rows else {}
        return {"per_layer": {pattern: fields for pattern in patterns} | dict(self.config.per_layer)}

    def table(self, rows: int | None = None) -> Table:
        """Make the table, costliest first, of ``rows`` parts."""
        words = {"kl": "KL", "output": "output error"}[self.measure]
        ordered = sorted(self.parts, key=lambda part: -part.cost.value)[:rows]
        cells = [
            [part.name, f"{part.weights:,}", f"{part.cost.value:.3g}", _range(part.cost), f"{self._share(part):.1%}"]
            for part in ordered
        ]
        title = f"Cost of quantizing one part alone; all together {self.together:.3g}, sum of parts {self.total:.3g}"
        return Table(
            title, ["part", "weights", words, "interval", "of the sum"], [list(map(Cell, row)) for row in cells]
        )

    def _share(self, part: Part) -> float:
        return part.cost.value / self.total if self.total > 0 else 0.0

    def __rich__(self) -> Any:
        return self.table().to_rich()

    def __str__(self) -> str:
        return as_text(self.table().to_rich(), width=160)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table(30).to_html()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        parts = [vars(part) | {"cost": part.cost.to_dict()} for part in self.parts]
        return {"measure": self.measure, "together": self.together, "config": self.config.to_dict(), "parts": parts}


def _as_served(parts: Iterable[Part]) -> list[list[Part]]:
    """Put together those of which servers make one matrix."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        prefix, _, leaf = part.name.rpartition(".")
        whole = next((f"{prefix} {leaves[0]}" for leaves in JOINED if leaf in leaves), part.name)
        groups.setdefault(whole, []).append(part)
    return list(groups.values())


def _range(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.low) else f"{estimate.low:.2g} to {estimate.high:.2g}"


@finishing_after_fork
@restoring
def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    config: AwqConfig | Mapping[str, Any] | None = None,
    *,
    by: str = "layer",
    samples: int = 4,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sensitivity:
    """Quantize every layer alone, all others float, and measure what that does to the model's output.

    For models with next-token logits that is the KL divergence from the float model: unlike the error of the layer or of its block
    it is in one unit for all layers, it sees what later layers make of an error, and the costs of small errors add up. For other
    models it is the squared error of the output, relative.

    loader: calibration samples; the cost is measured on the first ``samples`` of them (windows, for texts), whose float outputs are
    held in memory. by: "layer", or "block" for one measurement a block, which is quicker. Experts that the model keeps in one
    parameter are one part, since its own forward runs all of them or none in int4.
    config, settings: how layers are quantized, as for :func:`awq_ext.quantize`; scales are not folded, so that each layer stands
    for itself. Takes one forward of ``samples`` for every part. ``model`` is never written.
    """
    if by not in ("layer", "block"):
        raise ValueError(f'by={by!r}: choose "layer" or "block"')
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}: a number of samples, at least 1, is needed")
    config, model, loader = configured(config, settings), unwrapped(model), list(loader)
    quantized, trial = SharedCopy.of(model), SharedCopy.of(model)
    reading = {"tokenizer": tokenizer, "inputs": inputs}
    quantize(quantized.module, loader, config, blocks=blocks, progress=progress, fold="never", **reading)
    report = quantized.module.awq_report
    device = next(model.parameters()).device
    calls = read_calls(loader, device, tokenizer, inputs, config.seq_len, model)[:samples]
    parts = _parts(report, by, model)
    bootstrap = bootstrap or Bootstrap()
    with torch.no_grad(), calibration_mode(model), calibration_mode(trial.module), calibration_mode(quantized.module):
        outputs = _OutputCost(model, calls)
        together = outputs.cost(quantized.module).value
        found = []
        for name, places in tqdm(parts.items(), "quantizing alone", disable=not progress):
            with _swapped(trial.module, {place: quantized.module.get_submodule(place) for place in places}):
                cost = bootstrap.estimate(outputs.cost(trial.module))
            layers = tuple(layer for held in places.values() for layer in held)
            found.append(_part(name, layers, cost, report, model))
    quantized.check()
    trial.check()
    return Sensitivity(found, outputs.measure, together, config)


def _parts(report: AwqReport, by: str, model: nn.Module) -> dict[str, dict[str, list[str]]]:
    """Group the quantized layers, in calling order, by part and then by the module to swap.

    Layers that are no modules in the float model (experts fused into one parameter) are swapped with what holds them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = [block.name for block in report.blocks]
    found: dict[str, dict[str, list[str]]] = {}
    for row in report.layers:
        if row.status == "float":
            continue
        place = row.name
        while place not in modules:
            place = place.rpartition(".")[0]
        block = next((name for name in blocks if not name or f"{row.name}.".startswith(f"{name}.")), "")
        part = place if by == "layer" else block or "(whole model)"
        found.setdefault(part, {}).setdefault(place, []).append(row.name)
    return found


def _part(name: str, layers: tuple[str, ...], cost: Estimate, report: AwqReport, model: nn.Module) -> Part:
    rows = [report[layer] for layer in layers]
    weights = sum(row.in_features * row.out_features for row in rows)
    float_bits = 8 * next(model.parameters()).element_size()
    return Part(name, layers, weights, stored_bits(rows), float_bits, cost, sum(row.out_features for row in rows))


class _swapped:
    """Puts other modules in the place of a model's own while the body runs."""

    def __init__(self, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.places = []
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            self.places.append((root.get_submodule(parent)._modules, leaf, module))

    def __enter__(self) -> None:
        self.real = [modules[leaf] for modules, leaf, _ in self.places]
        for modules, leaf, module in self.places:
            modules[leaf] = module

    def __exit__(self, *_: object) -> None:
        for (modules, leaf, _), module in zip(self.places, self.real, strict=True):
            modules[leaf] = module


class _OutputCost:
    """Measures how far the outputs of a model are from the float model's, which are held."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.expected = [run_call(model, call, index) for index, call in enumerate(calls)]
        predict = all(_predicts(output, call) for output, call in zip(self.expected, calls, strict=True))
        self.measure = "kl" if predict else "output"

    def cost(self, model: nn.Module) -> Measure:
        """Measure the distance over all samples; its units are windows for "kl", samples for "output"."""
        score = self._divergence if self.measure == "kl" else self._distance
        rows = [
            score(run_call(model, call, index), expected, call)
            for index, (call, expected) in enumerate(zip(self.calls, self.expected, strict=True))
        ]
        totals, counts = torch.cat(rows, 1)
        return Measure(totals, counts)

    def _divergence(self, output: Any, expected: Any, call: Call) -> Tensor:
        logits, wanted, targets = logits_of(output), logits_of(expected), targets_of(call)
        mask = call.row_mask(logits)
        counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        scores = window_scores(logits, wanted, targets.clamp_min(0), counted)  # -100 among labels: not looked at here
        return torch.stack([scores[2], scores[0]]).cpu()

    def _distance(self, output: Any, expected: Any, call: Call) -> Tensor:
        one, other = float_tensors(output), float_tensors(expected)
        return torch.tensor([[distance_of(one, other) ** 2], [norm_of(other) ** 2]], dtype=torch.float64)


def _predicts(output: Any, call: Call) -> bool:
    logits, targets = logits_of(output), targets_of(call)
    return logits is not None and targets is not None and logits.shape[:-1] == targets.shape
