"""The tables in docs/guides/reference.md: the fields of AwqConfig and the public names, from the classes and their docstrings.

``python tests/reference.py`` writes what stands between the lines ``<!-- tables -->`` and ``<!-- end of tables -->``; with
``--check`` it only tells, by its exit status, whether that is up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch  # noqa: F401  (with which the public names are loaded)

import awq_ext
from awq_ext.config import EFFORTS, AwqConfig
from awq_ext.config.checks import _CHOICES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "reference.md"
TABLES = re.compile(r"(?<=<!-- tables -->\n\n).*?(?=\n\n<!-- end of tables -->)", re.DOTALL)
_GROUP = re.compile(r"^([A-Z][^:\n]*):$")
_FIELD = re.compile(r"^(\w+): (.*)$")
# Annotations that say little to a reader, in words.
_TYPES = {
    "tuple[Selector, ...]": "tuple of patterns or functions",
    "Mapping[str, Mapping[str, Any]]": "dict of pattern to dict of fields",
}


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring, or of a part of one, as Markdown."""
    plain = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", " ".join(text.split()).replace("``", "`"))
    return re.split(r"(?<=[.])\s", plain, maxsplit=1)[0].replace("|", "\\|")


def explained() -> Iterator[tuple[str, str, str]]:
    """Go through the docstring of AwqConfig: (group, field, what it says); before the first group that is ""."""
    group, field, lines = "", "", list[str]()
    for line in [*(inspect.getdoc(AwqConfig) or "").splitlines(), "End:"]:
        group_here, field_here = _GROUP.match(line), _FIELD.match(line)
        if field and (group_here or field_here or not line.strip()):
            yield group, field, " ".join(lines)
            field, lines = "", []
        if group_here:
            group = group_here[1]
        elif field_here:
            field, lines = field_here[1], [field_here[2]]
        elif field:
            lines.append(line.strip())


def _values(field: dataclasses.Field) -> str:
    if choices := _CHOICES.get(field.name):
        kind = "bool" if set(map(type, choices)) == {bool} else ", ".join(f"`{_shown(one)}`" for one in choices)
        return kind
    return _TYPES.get(field.type) or field.type.replace(" | ", " or ")


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _default(field: dataclasses.Field) -> str:
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return f"`{_shown(made)}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings() -> str:
    """The fields in the groups of the docstring, each with its values, its default and a sentence; then the efforts."""
    fields = {field.name: field for field in dataclasses.fields(AwqConfig)}
    groups: dict[str, list[list[str]]] = {}
    for group, name, text in explained():
        if name in fields:
            kind, default = _values(fields[name]), _default(fields.pop(name))
            groups.setdefault(group, []).append([f"`{name}`", kind, default, first_sentence(text)])
    if fields:
        raise SystemExit(f"the docstring of AwqConfig does not explain {', '.join(fields)}")
    parts = [
        f"### {group}\n\n{_table(('field', 'type or values', 'default', 'what it is'), rows)}"
        for group, rows in groups.items()
    ]
    efforts = [
        [f"`{name}`", ", ".join(f"`{field}={_shown(value)}`" for field, value in of_it.items())]
        for name, of_it in EFFORTS.items()
    ]
    return "\n\n".join([*parts, f"### What an effort sets\n\n{_table(('`effort=`', 'fields'), efforts)}"])


def names() -> str:
    """The public names with the first sentence of their docstrings: functions, then classes, then errors."""
    kinds: dict[str, list[list[str]]] = {"function": [], "class": [], "error": []}
    for name in sorted(set(awq_ext.__all__) - {"__version__"}):
        one = getattr(awq_ext, name)
        error = inspect.isclass(one) and issubclass(one, Exception)
        kind = "error" if error else "class" if inspect.isclass(one) else "function"
        kinds[kind].append([f"`{name}`", first_sentence(inspect.getdoc(one) or "")])
    return "\n\n".join(_table((kind, "what it is"), rows) for kind, rows in kinds.items())


def page() -> str:
    """The page with both tables as they are now."""
    made = f"## Settings\n\nThe fields of `awq_ext.AwqConfig`:\n\n{settings()}\n\n## Public names\n\n{names()}"
    return TABLES.sub(lambda _: made, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    written = page()
    if "--check" not in sys.argv:
        PAGE.write_text(written, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != written:
        raise SystemExit(f"{PAGE} is out of date: python tests/reference.py")
