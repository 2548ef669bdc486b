"""Find which input channels matter, and whether the calibration text shows the same ones as other texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.channels import Agreement, ChannelMeans, agreement, channel_salience, top_share
from ..calibration.statistics import collect
from ..config import AwqConfig
from ..forwards.forked import finishing_after_fork
from ..forwards.lockstep import Stop
from ..modules import unwrapped
from ..pipeline.session import Session, session
from ..reporting.tables import Cell, Table, as_text
from ..reporting.warn import warn
from ..survey.survey import BlockSurvey
from ..undo.thread_state import restoring


@dataclass(frozen=True)
class LayerSalience:
    """The input of one scale group, on the calibration text. salience: x_mean times the mean |weight| of each channel, fp32 [K].

    layers: the Linears that read it. top_share: part of all salience that the top 1 % of the channels hold. halves: agreement of
    two halves of the calibration text, which is what chance allows to expect. enough_tokens: from how many on nine channels of ten
    are known to within the tolerance (one standard error; extrapolated by 1 / sqrt(tokens)). traffic: agreement with each
    evaluation text, None where it does not come to this input.
    convergence: (tokens, mean relative distance of x_mean from its value over all tokens), for growing shares of the text.
    """

    layers: tuple[str, ...]
    tokens: int
    x_mean: Tensor
    salience: Tensor
    top_share: float
    halves: Agreement | None
    enough_tokens: int | None
    convergence: Sequence[tuple[int, float]]
    traffic: Mapping[str, Agreement | None] = field(default_factory=dict)

    def unlike(self, traffic: str) -> bool:
        """Return True if the calibration text fails to show the channels that matter to this evaluation text.

        It does if fewer than half of the top channels are the same, while two halves of the calibration text agree clearly
        better, in all channels too: then neither few tokens nor channels that are all alike explain it.
        """
        found, chance = self.traffic[traffic], self.halves or Agreement(1.0, 1.0)
        if found is None or found.overlap >= 0.5:
            return False
        return found.overlap < chance.overlap - 0.2 and found.correlation < chance.correlation


@dataclass(frozen=True, repr=False)  # its __str__ is what is to be seen
class Salience:
    """What :func:`salience` found, one row for each scale group; ``print`` shows it."""

    rows: Sequence[LayerSalience]
    traffic: Sequence[str]
    tolerance: float

    def __getitem__(self, name: str) -> LayerSalience:
        """The row that holds the Linear called ``name``; KeyError if there is none."""
        for row in self.rows:
            if name in row.layers:
                return row
        raise KeyError(name)

    def unlike(self, traffic: str) -> list[str]:
        """Name the first layer of each group for which the calibration text does not represent this evaluation text."""
        return [row.layers[0] for row in self.rows if row.unlike(traffic)]

    @property
    def enough_tokens(self) -> int | None:
        """Calibration tokens that are enough for nine groups of ten; None where a single sample tells nothing.

        An expert sees only a share of the tokens, and needs correspondingly more.
        """
        seen = max(row.tokens for row in self.rows)
        known = sorted(math.ceil(r.enough_tokens * seen / r.tokens) for r in self.rows if r.enough_tokens is not None)
        return known[min(len(known) - 1, math.ceil(0.9 * len(known)))] if known else None

    def warnings(self) -> list[str]:
        """Say what to change about the calibration."""
        found = []
        for name in self.traffic:
            if layers := self.unlike(name):
                shown = ", ".join(layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
                found.append(
                    f"the calibration is not representative of {name!r} in {len(layers)} groups: {shown}; add some of it"
                )
        tokens = max(row.tokens for row in self.rows)
        if self.enough_tokens is not None and self.enough_tokens > tokens:
            found.append(f"{tokens:,} tokens are few: about {self.enough_tokens:,} would settle the channel means")
        return found

    def table(self) -> Table:
        """Make the table, one row for each scale group."""
        header = ["input of", "channels", "top 1 % hold", "halves agree", *self.traffic, "tokens enough"]
        rows = [self._cells(row) for row in self.rows]
        return Table("Top 1 % of the channels shared with the calibration (rank correlation of all)", header, rows)

    def _cells(self, row: LayerSalience) -> list[Cell]:
        shown = lambda a: "" if a is None else f"{a.overlap:.0%} ({a.correlation:.2f})"  # noqa: E731
        enough = "" if row.enough_tokens is None else f"{row.enough_tokens:,}"
        texts = [row.layers[0], f"{len(row.x_mean)}", f"{row.top_share:.0%}", shown(row.halves)]
        marked = [Cell(shown(row.traffic[name]), best=row.unlike(name)) for name in self.traffic]
        return [*map(Cell, texts), *marked, Cell(enough)]

    def __rich__(self) -> Any:
        return self.table().to_rich()

    def __str__(self) -> str:
        return "\n".join(
            [as_text(self.table().to_rich(), width=240), *(f"warning: {text}" for text in self.warnings())]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the channels themselves, ready for JSON."""
        plain = ("layers", "tokens", "top_share", "enough_tokens", "convergence")
        rows = []
        for row in self.rows:
            agreements = {
                "halves": row.halves and vars(row.halves),
                "traffic": {k: v and vars(v) for k, v in row.traffic.items()},
            }
            rows.append({name: getattr(row, name) for name in plain} | agreements)
        return {
            "tolerance": self.tolerance,
            "enough_tokens": self.enough_tokens,
            "rows": rows,
            "warnings": self.warnings(),
        }


@dataclass(frozen=True)
class _Seen:
    """One scale group on one text."""

    layers: tuple[str, ...]
    weight: Tensor  # mean |weight| of each channel
    means: ChannelMeans

    def salience(self, x_mean: Tensor) -> Tensor:
        return x_mean * self.weight


@finishing_after_fork
@restoring
def salience(
    model: nn.Module,
    loader: Iterable[Any],
    traffic: Mapping[str, Iterable[Any]] | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    tolerance: float = 0.1,
    progress: bool = True,
    **settings: Any,
) -> Salience:
    """Show which channels are large on the calibration text, and whether the same ones are large on your evaluation texts.

    loader: the calibration samples. traffic: evaluation samples by name, such as {"code": [...]}. Both as
        :func:`awq_ext.quantize` reads them.
    tolerance: relative standard error below which a channel's mean |x| counts as known. AWQ takes the square root or so of it
        (s = x_mean^alpha), and one step of alpha's grid moves the s of a channel ten times the mean by 12 %.
    settings: fields of :class:`AwqConfig` that choose layers, such as ``skip``.

    Forwards only: the model is not changed. Warns, naming layers, where the calibration text is not representative or too short.
    Raises what ``quantize`` raises for the same samples.
    """
    if traffic is not None and not isinstance(traffic, Mapping):
        raise TypeError('traffic: a dict of loaders by name is needed, such as {"code": [...], "json": [...]}')
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r}: a positive number is needed, such as 0.1")
    config, model = AwqConfig(**settings), unwrapped(model)
    texts = {None: loader, **(traffic or {})}
    seen: dict[str | None, list[_Seen]] = {}
    for name, samples in tqdm(texts.items(), "watching", disable=not progress):
        with session(model, samples, config, tokenizer, inputs) as opened:
            seen[name] = _watch(opened, blocks)
    others = {name: {one.layers[0]: one for one in found} for name, found in seen.items() if name is not None}
    rows = [_row(one, {n: found.get(one.layers[0]) for n, found in others.items()}, tolerance) for one in seen[None]]
    found = Salience(rows, list(others), tolerance)
    for text in found.warnings():
        warn(text)
    return found


def _watch(opened: Session, names: Sequence[str] | None) -> list[_Seen]:
    """Collect the channel means of every scale group, from one lockstep pass as quantize() makes it."""
    found = []
    with opened.surveyed(names) as surveys, opened.visits(surveys, opened.calls) as visits:
        for surveyed, stops in visits:
            if surveyed.groups:
                found += _one_block(surveyed, stops, opened.device, last=surveyed is surveys[-1])
    return found


def _one_block(surveyed: BlockSurvey, stops: list[Stop], device: torch.device, last: bool) -> list[_Seen]:
    statistics, _ = collect(surveyed, stops, device, last, accumulator=ChannelMeans)
    found = []
    for group, seen in zip(surveyed.groups, statistics, strict=True):
        for layers in group.inputs:
            weights = [surveyed.linears[name].weight.detach() for name in layers]
            ones = torch.ones(weights[0].shape[1], device=device)
            found.append(_Seen(tuple(layers), channel_salience(ones, weights), seen.inputs[layers[0]].stats))
    return found


def _row(one: _Seen, others: Mapping[str, _Seen | None], tolerance: float) -> LayerSalience:
    means, x_mean = one.means, one.means.x_mean()
    values, halves, error = one.salience(x_mean), means.halves(), means.relative_error()
    enough = None
    if error is not None:
        share = torch.quantile(error, 0.9).item() / tolerance
        enough = max(1, math.ceil(means.rows * share**2))
    return LayerSalience(
        layers=one.layers,
        tokens=means.rows,
        x_mean=x_mean,
        salience=values,
        top_share=top_share(values),
        halves=halves and agreement(*map(one.salience, halves)),
        enough_tokens=enough,
        convergence=[(rows, _distance(then, x_mean)) for rows, then in means.snapshots],
        traffic={name: _agreement(one, values, other) for name, other in others.items()},
    )


def _agreement(one: _Seen, values: Tensor, other: _Seen | None) -> Agreement | None:
    """Compare one evaluation text: None where none of it reaches this input, no agreement where no calibration row did."""
    if other is None or other.means.rows == 0:
        return None
    return agreement(values, other.salience(other.means.x_mean())) if one.means.rows else Agreement(0.0, 0.0)


def _distance(then: Tensor, now: Tensor) -> float:
    known = now > 0
    return float(((then - now).abs()[known] / now[known]).mean()) if known.any() else 0.0
