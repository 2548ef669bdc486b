"""Write a model card (README.md) that says what a quantized directory is, where it comes from and how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .origin import versions
from .readers import Reader, readers, rounded
from .report import AwqReport
from .scores import Scores, score_facts, table_rows, with_scores
from .tables import format_bytes

CARD = "README.md"
# where the float model's own card goes, to which ours refers
BASE_CARD = "README.base.md"
# entries of a card's header that are true of the quantized model as well
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
MARK = "<!-- awq_ext writes this card anew whenever the model is saved here; without this line it stays as it is -->"


@dataclass(frozen=True)
class Card:
    """What a card tells.

    layers: how many are quantized; base: the float model's name, or ""; before, after: bytes of the weights;
    bits: that the layers have; scores: by the name of the text; inherited: lines of the
    header of the base model's card; base_card: whether that lies beside this one.
    """

    format: str
    layers: int
    group_sizes: Sequence[int]
    symmetric: bool
    report: AwqReport | None
    base: str
    before: int
    after: int
    bits: Sequence[int]
    scores: Scores
    inherited: str = ""
    base_card: bool = False

    def text(self) -> str:
        """Render as Markdown, with the header that the Hugging Face hub reads."""
        tags = [f"- int{bits}" for bits in self.bits]
        head = ["---", "library_name: transformers", "tags:", "- awq", *tags, "- awq_ext"]
        if "/" in self.base:  # the name of a repository
            head += [f"base_model: {self.base}", "base_model_relation: quantized"]
        head += self.inherited.splitlines()
        rows = table_rows(self._facts()).rstrip("\n")
        use = "\n\n".join(_recipe(reader) for reader in readers(self.format, not self.symmetric))
        title = f"# {self.base.rpartition('/')[2] or 'A model'} in {self._widths} bits"
        parts = ["\n".join([*head, "---", MARK]), title, f"| | |\n|---|---|\n{rows}", "## Load and serve", use]
        if self.base_card:
            parts.append(f"## The float model\n\nIts own card is [{BASE_CARD}]({BASE_CARD}).")
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
        if any(bits in self.bits for bits in rounded(self.format)):
            facts.append(
                ("activations", "of layers of 8 bits: rounded to 8 bits while the model runs, each token by its range")
            )
        facts += _told(self.report) if self.report is not None else []
        facts += score_facts(self.scores, self.base)
        facts.append(("size of the weights", f"{format_bytes(self.before)} before, {format_bytes(self.after)} after"))
        return [*facts, ("made with", ", ".join(f"{name} {number}" for name, number in versions().items()))]


def _told(report: AwqReport) -> list[tuple[str, str]]:
    """Tell what the report knows of the calibration, the losses and the settings."""
    facts = []
    if tokens := _tokens(report):
        facts.append(("calibrated on", tokens))
    ratios = [layer.loss / layer.loss_rtn for layer in report.layers if layer.loss is not None and layer.loss_rtn]
    if ratios:
        facts.append(("output error", f"{median(ratios):.2f} of plain rounding's (median of {len(ratios)} layers)"))
    command = report.command.replace("|", "\\|").replace("`", "'")
    return [*facts, ("command", f"`{command}`")] if command else facts


def _tokens(report: AwqReport) -> str:
    """Say how many tokens were given, and how many of the package's own texts came beside them; "" where none are told."""
    rows = max((layer.tokens for layer in report.layers), default=0)
    given, builtin = report.calibration_tokens, report.builtin_tokens
    if not given or not rows:  # not of a language model, or rounded plainly
        return f"{rows:,} tokens" if rows else ""
    if given == builtin and not report.config.get("builtin_text"):  # these alone; beside others they may be as many
        return f"{builtin:,} built-in tokens"
    return f"{given:,} tokens given" + (f", {builtin:,} built-in" if builtin else "")


def _recipe(reader: Reader) -> str:
    needs = f" ({reader.needs})" if reader.needs else ""
    command = reader.command.format("PATH_OR_NAME").replace("; ", "\n")
    imports = [f"import {name}\n" for name in ("awq", "awq_ext", "transformers") if f"{name}." in command]
    start = "".join(imports) if reader.language == "python" else ""
    return f"{reader.name}{needs}:\n\n```{reader.language}\n{start}{command}\n```"


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
    text = read_card(folder)
    found = re.search(r"^\| base model \| (.+) \|$", text, re.MULTILINE) if MARK in text else None
    return found[1] if found else ""


def inherited_from(card: str) -> str:
    """Take the entries about licence, language and task from the header of a card, as they stand there.

    Words, and lists of words; anything odder is left, as it could spoil the header that it comes into.
    """
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.lstrip("\ufeff"), re.DOTALL)
    # an entry reaches to the next line that begins with a name
    entries = re.findall(r"^([\w-]+):(.*(?:\n(?![\w-]+:).*)*)", header[1] if header else "", re.MULTILINE)
    return "\n".join(f"{name}:{value.rstrip()}" for name, value in entries if name in _INHERITED and _plain(value))


def _plain(value: str) -> bool:
    """Tell whether the value of an entry in YAML is a word or a list of words."""
    word = r"""("[^"\\\n]*"|'[^'\n]*'|[A-Za-z0-9](?:[^\n:#]|:(?=\S))*)"""
    forms = (rf" *{word}\s*", rf"(\n *- +{word})+\s*", r" *\[ *[\w-]+( *, *[\w-]+)* *\]\s*")
    return any(re.fullmatch(form, value) for form in forms)


def read_card(folder: Path | None) -> str:
    """Read the card of a directory; "" where there is none."""
    path = None if folder is None else folder / CARD
    return "" if path is None or not path.is_file() else path.read_text(encoding="utf-8", errors="replace")


def put_scores(folder: Path, scores: Scores) -> None:
    """Exchange the scores in the card of ``folder``, if it is one of ours."""
    text = read_card(folder)
    if MARK in text:
        (folder / CARD).write_text(with_scores(text, scores), encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Tell whether a card may be written in ``folder``: there is none, or one that nobody has made his own."""
    return not (folder / CARD).exists() or MARK in read_card(folder)


def write_card(to: Path, card: Card, target: Path) -> None:
    """Write the card into ``to``, which becomes ``target``, unless a person's lies in either."""
    if is_ours(target) and is_ours(to):
        (to / CARD).write_text(card.text(), encoding="utf-8")
