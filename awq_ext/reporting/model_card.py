"""Write a model card (README.md) that says what a quantized directory is, where it comes from and how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from .readers import Reader, readers
from .report import AwqReport
from .tables import format_bytes

CARD = "README.md"
MARK = "<!-- awq_ext writes this card anew whenever the model is saved here; without this line it stays as it is -->"


@dataclass(frozen=True)
class Card:
    """What a card tells.

    layers: how many are quantized; bits: that they have; base: the float model's name, or ""; before, after: bytes of the
    weights; usual: the settings that go without saying.
    """

    format: str
    layers: int
    group_sizes: Sequence[int]
    symmetric: bool
    report: AwqReport | None
    base: str
    before: int
    after: int
    usual: Mapping[str, Any]
    bits: Sequence[int] = (4,)

    def text(self) -> str:
        """Render as Markdown, with the header that the Hugging Face hub reads."""
        tags = [f"- int{bits}" for bits in self.bits]
        head = ["---", "library_name: transformers", "tags:", "- awq", *tags, "- awq_ext"]
        if "/" in self.base:  # the name of a repository
            head += [f"base_model: {self.base}", "base_model_relation: quantized"]
        rows = "\n".join(f"| {name} | {value} |" for name, value in self._facts())
        use = "\n\n".join(_recipe(reader) for reader in readers(self.format))
        title = f"# {self.base.rpartition('/')[2] or 'A model'} in {self._widths} bits"
        parts = ["\n".join([*head, "---", MARK]), title, f"| | |\n|---|---|\n{rows}", "## Load and serve", use]
        return "\n\n".join(parts) + "\n"

    @property
    def _widths(self) -> str:
        return " and ".join(map(str, self.bits))

    def _facts(self) -> list[tuple[str, str]]:
        facts = []
        if self.base:
            facts.append(("base model", self.base))
        if self.report is not None:
            facts.append(("method", str(self.report.config.get("method", "awq"))))
        sizes = ", ".join("whole rows" if size == -1 else str(size) for size in self.group_sizes)
        zeros = "symmetric" if self.symmetric else "with zero points"
        facts.append(
            (
                "weights",
                f"{self._widths} bits, groups of {sizes}, {zeros}; {self.layers} layers; format `{self.format}`",
            )
        )
        facts += _told(self.report, self.usual) if self.report is not None else []
        facts.append(("size of the weights", f"{format_bytes(self.before)} before, {format_bytes(self.after)} after"))
        return [*facts, ("made with", _versions())]


def _told(report: AwqReport, usual: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tell what the report knows of the calibration, the losses and the settings."""
    facts = []
    if tokens := max((layer.tokens for layer in report.layers), default=0):
        facts.append(("calibrated on", f"{tokens:,} tokens"))
    ratios = [layer.loss / layer.loss_rtn for layer in report.layers if layer.loss is not None and layer.loss_rtn]
    if ratios:
        facts.append(("output error", f"{median(ratios):.2f} of plain rounding's (median of {len(ratios)} layers)"))
    chosen = {k: v for k, v in report.config.items() if v != usual.get(k)}
    arguments = "".join(f", {name}={_shown(value)}" for name, value in chosen.items())
    return [*facts, ("command", f"`awq_ext.quantize(model, calibration{arguments})`")]


def _shown(value: Any) -> str:
    return repr(tuple(value) if isinstance(value, list) else value).replace("|", "\\|").replace("`", "'")


def _recipe(reader: Reader) -> str:
    needs = f" ({reader.needs})" if reader.needs else ""
    command = reader.command.format("PATH_OR_NAME").replace("; ", "\n")
    imports = [f"import {name}\n" for name in ("awq", "awq_ext", "transformers") if f"{name}." in command]
    start = "".join(imports) if reader.language == "python" else ""
    return f"{reader.name}{needs}:\n\n```{reader.language}\n{start}{command}\n```"


def _versions() -> str:
    names = {"awq-ext": "awq_ext", "torch": "torch", "transformers": "transformers"}
    found = []
    for distribution, name in names.items():
        try:
            found.append(f"{name} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def base_name(name: object) -> str:
    """Name the model that another was made from: a repository (in the hub's cache too), or a directory without its path."""
    if not isinstance(name, str) or not name:
        return ""
    if cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{name}/"):
        return "/".join(cached.groups())
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.isdir(name)
    return name if repository else Path(name).name


def base_of(folder: Path) -> str:
    """Read the base model from a card of ours; "" where none says it."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).exists() else ""
    found = re.search(r"^\| base model \| (.+) \|$", text, re.MULTILINE) if MARK in text else None
    return found[1] if found else ""


def is_ours(folder: Path) -> bool:
    """Tell whether a card may be written in ``folder``: there is none, or one that nobody has made his own."""
    path = folder / CARD
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(to: Path, card: Card, target: Path) -> None:
    """Write the card into ``to``, which becomes ``target``, unless a person's lies in either."""
    if is_ours(target) and is_ours(to):
        (to / CARD).write_text(card.text(), encoding="utf-8")
