"""Say at the top of the page what the model is, how good it is, and what to mind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..report import FEW_TOKENS, AwqReport
from ..scores import LARGE, USUAL
from ..sizes import stored_bits
from ..tables import counted, format_bytes

_MOST_NAMES = 4  # in a warning or a reason; more of them are folded away
_NORMAL = 1.96  # standard deviations to each side that a 95 % interval reaches


@dataclass(frozen=True)
class Verdict:
    """level: good, fair (not measured, or to be looked at) or bad; text: why, in a sentence."""

    level: str
    text: str


@dataclass(frozen=True)
class Tile:
    """A figure: what it is, how much, and more on it; level: "warn" or "bad" for one to be looked at."""

    what: str
    value: str
    more: str = ""
    level: str = ""


@dataclass(frozen=True)
class Divergence:
    """The KL divergence from the float model on one evaluation text, nats a token; nan where it is not finite."""

    text: str
    value: float
    low: float
    high: float
    top1: float | None

    @property
    def error(self) -> float:
        """Its standard error, as its interval tells it; nan without one."""
        return (self.high - self.low) / (2 * _NORMAL)

    def differs_from(self, other: Divergence) -> bool:
        """Tell whether two differ significantly, at 5 %; windows of two texts are independent."""
        return abs(self.value - other.value) > _NORMAL * math.hypot(self.error, other.error)

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.value:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def divergences(report: AwqReport) -> list[Divergence]:
    """Collect the divergences that were measured, the largest first; those that are not finite before all."""

    def number(one: Mapping[str, Any], name: str) -> float:
        found = one.get(name)
        return math.nan if found is None else float(found)

    found = [
        Divergence(
            text, *(number(one["kl"], part) for part in ("value", "low", "high")), one.get("top1", {}).get("value")
        )
        for text, one in report.evaluations.items()
        if isinstance(one.get("kl"), Mapping)
    ]
    return sorted(found, key=lambda one: -one.value if math.isfinite(one.value) else -math.inf)


def verdict(report: AwqReport) -> Verdict:
    """Judge the result in one sentence, by the largest divergence that was measured."""
    found = divergences(report)
    size = f"{report.bytes_after / report.bytes_before:.0%} of its size" if report.bytes_before else "a smaller size"
    if not found:
        ratios = [row.loss / row.loss_rtn for row in report.layers if row.loss is not None and row.loss_rtn]
        rest = f", with {median(ratios):.0%} of plain rounding's output error (median of the layers)" if ratios else ""
        return Verdict("fair", f"The float model at {size}{rest}; how far it is from it was not measured.")
    worst = found[0]
    if not math.isfinite(worst.value):
        return Verdict("bad", f"Do not use it: on {worst.text} the model computes values that are not finite.")
    where = f" on {worst.text}" + (", the worst evaluation text" if len(found) > 1 else "")
    measured = f"KL divergence {worst} nats a token{where}"
    usual = f"less than {USUAL} is usual with 4 bits"
    if worst.value > LARGE:
        return Verdict("bad", f"Far from the float model: {measured}, where {usual}.")
    same = "" if worst.top1 is None else f", and the same likeliest token for {worst.top1:.0%}"
    if worst.value > USUAL:
        return Verdict("fair", f"Farther from the float model than usual, at {size}: {measured}, where {usual}{same}.")
    return Verdict("good", f"As near to the float model as 4 bits usually are, at {size}: {measured} ({usual}){same}.")


def between_texts(report: AwqReport) -> str:
    """Say on which evaluation texts the divergence is significantly larger than on the best of them; "" for a single one."""
    found = [one for one in divergences(report) if math.isfinite(one.error)]
    if len(found) < 2:
        return ""
    best = found[-1]
    worse = [one.text for one in found[:-1] if one.differs_from(best)]
    alike = [one.text for one in found[:-1] if not one.differs_from(best)]
    parts = [f"significantly larger on {', '.join(worse)}"] if worse else []
    parts += [f"not significantly different on {', '.join(alike)}"] if alike else []
    advice = " More calibration text of that kind may lessen it." if worse else ""
    return f"Compared with {best.text}, the divergence is {' and '.join(parts)} (at 5 %, from the intervals).{advice}"


def facts(report: AwqReport) -> list[tuple[str, str]]:
    """List what was made of what, when and by which versions; what an older report does not know is left out."""
    size = ""
    if report.bytes_before:
        before, after = report.bytes_before, report.bytes_after
        size = f"{format_bytes(before)} → {format_bytes(after)} ({before:,} → {after:,} bytes, {after / before:.1%})"
    model = f"{report.model} ({report.parameters:,} parameters)" if report.model else ""
    date = report.date.replace("T", " ").replace("+00:00", " UTC")
    made = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    found = [("model", model), ("size", size), ("date", date), ("versions", made)]
    return [(name, text) for name, text in found if text]


def tiles(report: AwqReport) -> list[Tile]:
    """List the figures of the summary."""
    done = [row for row in report.layers if row.status != "float"]
    loss, rtn = (sum(getattr(row, name) or 0.0 for row in done) for name in ("loss", "loss_rtn"))
    ratio = report.bytes_after / report.bytes_before if report.bytes_before else 0.0
    bits = sorted({row.bits for row in done})
    codes = f"codes of {' and '.join(map(str, bits))}, with scales and zeros" if bits else ""
    found = [
        Tile("of the size", f"{ratio:.1%}", f"{1 / ratio:.2f} times smaller") if ratio else None,
        _divergence_tile(report),
        Tile("bits a weight", f"{stored_bits(done):.2f}", codes) if done else None,
        Tile(
            "of all parameters",
            f"{report.share_quantized:.1%}",
            f"{len(done)} of {counted(len(report.layers), 'Linear')}",
        ),
        Tile("loss / RTN's", f"{loss / rtn:.3f}" if rtn else "not measured", "summed over the layers"),
        _tokens_tile(report),
        Tile("time", f"{report.seconds:.1f} s"),
        Tile(
            "peak memory",
            format_bytes(report.peak_memory_bytes),
            f"planned about {format_bytes(report.planned_memory_bytes)}",
        ),
    ]
    return [tile for tile in found if tile is not None]


def _divergence_tile(report: AwqReport) -> Tile:
    found = divergences(report)
    if not found:
        return Tile("KL, nats a token", "not measured", "by awq-ext eval, with the float model", "warn")
    worst = found[0]
    level = "" if worst.value <= USUAL else "warn" if worst.value <= LARGE else "bad"  # nan, too
    more = f"on {worst.text}" + (f", the worst of {len(found)}" if len(found) > 1 else "")
    return Tile("KL, nats a token", str(worst) if math.isfinite(worst.value) else "not finite", more, level)


def _tokens_tile(report: AwqReport) -> Tile:
    seen = [row.tokens for row in report.layers if row.status != "float"] or [0]
    span = f"{min(seen):,}" if min(seen) == max(seen) else f"{min(seen):,} to {max(seen):,}"
    level = "warn" if report.few_tokens else ""
    more = f"few: {FEW_TOKENS:,} or more are steady" if level else "by each layer"
    return Tile("calibration tokens seen", span, more, level)


def warnings(report: AwqReport) -> list[tuple[str, str]]:
    """List the warnings, those of many names as (how many and what is wrong, the names), others as (text, "")."""
    return [_folded(text) for text in (report.few_tokens, *report.warnings) if text]


def _folded(warning: str) -> tuple[str, str]:
    names, colon, text = warning.rpartition(": ")
    count = len(names.split(", "))
    return (f"{count} layers: {text}", names) if colon and count > _MOST_NAMES else (warning, "")


def reasons(report: AwqReport) -> list[tuple[str, str, bool]]:
    """List why layers stayed float: (reason, their names, whether these are so many that they are folded away)."""
    found: dict[str, list[str]] = {}
    for row in report.layers:
        if row.status == "float":
            found.setdefault(row.note, []).append(row.name)
    listed = []
    for reason, names in found.items():
        many = len(names) > _MOST_NAMES
        listed.append((f"{reason}: {counted(len(names), 'layer')}" if many else reason, ", ".join(names), many))
    return listed


def importance_weighted(report: AwqReport) -> bool:
    """Tell whether losses weigh calibration rows by how much the model's output reacts to errors on them."""
    config = report.config
    methods = {config.get("method"), *(one.get("method") for one in (config.get("per_layer") or {}).values())}
    asked = config.get("objective")
    return asked == "model" or (asked is None and any("gptq" in str(method) for method in methods))
