"""What compare() found, as tables that say which differences are within the noise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from ..reporting.new_file import write_new
from ..reporting.report import AwqReport
from ..reporting.tables import Cell, Table, as_text, counted
from .bootstrap import Bootstrap, Estimate
from .evaluate import Evaluation

FLOAT = "float"
NOISE = "≈"


@dataclass(frozen=True)
class Variant:
    """One row: a method, or the float model (config None).

    size_bytes: as stored (simulated: as it would be, packed); seconds to quantize; speeds: "windows" and "steps" (one token at a
    time) -> tokens a second of this model, and of the float model measured in turns with it; evaluations by evaluation text.
    """

    label: str
    config: Mapping[str, Any] | None
    size_bytes: int = 0
    seconds: float | None = None
    simulated: bool = False
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    speeds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    report: AwqReport | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the report is left out."""
        speeds = {kind: {"tokens_per_second": a, "float_beside_it": b} for kind, (a, b) in self.speeds.items()}
        plain = {
            name: getattr(self, name) for name in ("label", "config", "size_bytes", "seconds", "simulated", "error")
        }
        return plain | {"speeds": speeds, "evaluations": {k: v.to_dict() for k, v in self.evaluations.items()}}


@dataclass(frozen=True, repr=False)  # its __str__ is what is to be seen
class Comparison:
    """What :func:`compare` found: one row for each method, after that of the float model.

    ``print`` it, show it in a notebook, or take ``to_markdown()`` or ``to_json()``.
    """

    rows: Sequence[Variant]
    traffic: Sequence[str]
    threads: int
    bootstrap: Bootstrap

    def __getitem__(self, label: str) -> Variant:
        """The row called ``label``; KeyError names those there are."""
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no row {label!r}: there are {', '.join(row.label for row in self.rows)}")

    @property
    def measures(self) -> list[str]:
        """The names of the measures, as in :class:`Evaluation`."""
        return list(dict.fromkeys(name for row in self._done for name in row.evaluations[self.traffic[0]].measures))

    @property
    def _done(self) -> list[Variant]:
        return [row for row in self.rows[1:] if not row.error]

    def difference(self, one: str, other: str, traffic: str, measure: str = "perplexity") -> Estimate:
        """Subtract the measure of ``other`` from that of ``one``, paired over windows; ``within_noise`` where it may be nothing."""
        return self[one].evaluations[traffic].difference(self[other].evaluations[traffic], measure)

    def best(self, traffic: str, measure: str = "perplexity") -> list[str]:
        """List the best method, then those not significantly different from it. The float model does not take part."""
        return list(self._best[traffic, measure])

    @cached_property
    def _best(self) -> dict[tuple[str, str], list[str]]:
        return {(name, measure): self._ranked(name, measure) for name in self.traffic for measure in self.measures}

    def _ranked(self, traffic: str, measure: str) -> list[str]:
        values = {row.label: row.evaluations[traffic].measures[measure] for row in self._done}
        sign = 1 if next(iter(values.values())).better == "lower" else -1
        order = sorted(values, key=lambda label: sign * values[label].value)
        ties = [x for x in order[1:] if self.difference(x, order[0], traffic, measure).within_noise]
        return [order[0], *ties]

    def gap_closed(self, label: str, traffic: str, baseline: str = "rtn") -> float | None:
        """Return the share of the perplexity lost by ``baseline`` against float that ``label`` wins back.

        None where the baseline's loss is not significant.
        """
        gap = self.difference(baseline, FLOAT, traffic)
        return self.difference(baseline, label, traffic).value / gap.value if gap.low > 0 else None

    def tables(self) -> list[Table]:
        """Make the tables: what each method costs, then what it scores on each evaluation text."""
        return [self._cost_table(), *(self._score_table(name) for name in self.traffic)]

    def _cost_table(self) -> Table:
        titles = {"windows": "tokens/s", "steps": "tokens/s, single"}
        timed = [call for call in titles if call in self.rows[0].speeds]
        header = ["method", "MB", "of float", "seconds", *(t for call in timed for t in (titles[call], "× float"))]
        if "perplexity" not in self.measures:
            header = [name.replace("tokens", "rows") for name in header]
        rows = []
        for row in self.rows:
            if row.error:
                rows.append([Cell(row.label), Cell("failed"), *[Cell("")] * (len(header) - 2)])
                continue
            size = f"{_megabytes(row.size_bytes)}{'*' if row.simulated else ''}"
            cells = [row.label, size, f"{row.size_bytes / self.rows[0].size_bytes:.0%}"]
            cells.append("" if row.seconds is None else f"{row.seconds:.1f}")
            for call in timed:
                known = call in row.speeds
                cells += [f"{row.speeds[call][0]:,.0f}" if known else ""]
                cells += [self._times_float(row, call) if known and row.config else ""]
            rows.append([Cell(text) for text in cells])
        return Table(f"Cost ({counted(self.threads, 'thread')})", header, rows)

    def _times_float(self, row: Variant, call: str) -> str:
        """Divide by the float model's speed beside this method; say that speed where the float row has another.

        Both took turns, so whatever else the machine did met both. The float row has the best of all methods' turns.
        """
        own, beside = row.speeds[call]
        ratio = f"{own / beside:.2f}"
        return ratio if ratio == f"{own / self.rows[0].speeds[call][0]:.2f}" else f"{ratio} of {beside:,.0f}"

    def _score_table(self, traffic: str) -> Table:
        language = "perplexity" in self.measures
        baseline = language and any(row.label == "rtn" for row in self._done)
        header = ["method", *self.measures]
        if language:
            header[2:2] = ["over float", *(["of RTN's gap closed"] if baseline else [])]
        rows = [self._scores(row, traffic, baseline, len(header)) for row in self.rows if not row.error]
        scored = self.rows[0].evaluations[traffic]
        unit = "tokens" if language else "values"
        return Table(f"{traffic}: {scored.tokens:,} {unit} in {counted(scored.windows, 'window')}", header, rows)

    def _scores(self, row: Variant, traffic: str, baseline: bool, width: int) -> list[Cell]:
        found = row.evaluations[traffic]
        cells = [Cell(row.label)]
        for measure in self.measures:
            if measure not in found.measures:
                cells.append(Cell(""))
                continue
            text = f"{found[measure].value:.3f}" if measure == "perplexity" else plus_minus(found[measure])
            order = self.best(traffic, measure) if row.config else []
            mark = f" {NOISE}" if row.label in order[1:] else ""
            cells.append(Cell(text + mark, best=row.label in order[:1]))
            if measure == "perplexity":
                cells.append(Cell(_over_float(found, self.rows[0].evaluations[traffic]) if row.config else ""))
            if measure == "perplexity" and baseline:
                share = self.gap_closed(row.label, traffic) if self._like_rtn(row) else None
                cells.append(Cell("" if share is None else f"{share:.0%}"))
        return cells + [Cell("")] * (width - len(cells))

    def _like_rtn(self, row: Variant) -> bool:
        """Tell whether a row has RTN's bits and groups, so that RTN's loss is what it could win back."""
        if row.config is None or row.label == "rtn":
            return False
        return all(row.config[name] == self["rtn"].config[name] for name in ("bits", "group_size", "symmetric"))

    def notes(self, bold: bool = True) -> list[str]:
        """Explain how to read the tables, and what they say of each evaluation text. bold: whether the best can stand out."""
        share = f"{self.bootstrap.confidence:.0%}"
        lines = [
            f"±: half the {share} bootstrap interval over windows; {NOISE}: not significantly different from the best"
            f"{' (bold)' if bold else ''}"
        ]
        if any(row.simulated for row in self.rows):
            lines.append("*: simulated, the size is what packed weights would take")
        if any(" of " in self._times_float(row, call) for row in self._done for call in row.speeds):
            lines.append("× float, of N: the float model ran at N tokens/s beside this method")
        measure = "perplexity" if "perplexity" in self.measures else self.measures[0]
        for name in self.traffic:
            first, *ties = self.best(name, measure)
            if len(self._done) == 1:
                continue
            says = f"{first} is best"
            if ties:
                says = f"{', '.join([first, *ties])} are not significantly different"
            lines.append(f"{name}, by {measure}: {says}")
        return lines + [f"{row.label} failed: {row.error}" for row in self.rows if row.error]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (table.to_rich() for table in self.tables())
        yield "\n".join(self.notes(bold=console.color_system is not None))  # a file, or a terminal that knows no styles

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def to_markdown(self) -> str:
        """All tables and notes as Markdown."""
        parts = [table.to_markdown() for table in self.tables()]
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self.notes())]) + "\n"

    def _repr_html_(self) -> str:
        from html import escape

        notes = "".join(f"<li>{escape(line)}</li>" for line in self.notes())
        return "<div>" + "".join(table.to_html() for table in self.tables()) + f"<ul>{notes}</ul></div>"

    def to_dict(self) -> dict[str, Any]:
        """Every figure with its interval, differences from float and who is best: plain values, ready for JSON."""
        differences = {
            row.label: {
                name: {m: self.difference(row.label, FLOAT, name, m).to_dict() for m in self._against_float()}
                for name in self.traffic
            }
            for row in self._done
        }
        return {
            "threads": self.threads,
            "bootstrap": self.bootstrap.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "over_float": differences,
            "best": {name: {m: self.best(name, m) for m in self.measures} for name in self.traffic},
        }

    def _against_float(self) -> list[str]:
        return [m for m in self.measures if m in self.rows[0].evaluations[self.traffic[0]].measures]

    def to_json(self, path: str | os.PathLike[str] | None = None, overwrite: bool = False) -> str:
        """:meth:`to_dict` as text, written to ``path`` where one is given; FileExistsError for a file, unless ``overwrite``."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        if path is not None:
            write_new(path, text, overwrite)
        return text


def _megabytes(count: int) -> str:
    """Format a size with three digits at least: small models have sizes too."""
    return f"{count / 1e6:,.1f}" if count >= 10**7 else f"{count / 1e6:.3g}"


def _over_float(one: Evaluation, float_one: Evaluation) -> str:
    """Format how much higher the perplexity is, in percent: a ratio varies less between windows than a difference."""
    ratio = one.ratio(float_one, "perplexity")
    percent = Estimate(*(100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)))
    return f"{plus_minus(percent, '+')} %"


def plus_minus(estimate: Estimate, sign: str = "") -> str:
    """Format an estimate as ``0.213 ± 0.014``, or as the value alone where the interval is not known."""
    half = (estimate.high - estimate.low) / 2
    if not math.isfinite(half):
        return f"{estimate.value:{sign}.4f}"
    digits = 4 if half == 0 else min(6, max(1, 1 - math.floor(math.log10(half))))
    return f"{estimate.value:{sign}.{digits}f} ± {half:.{digits}f}"
