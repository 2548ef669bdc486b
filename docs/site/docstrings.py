"""Turn this package's plain docstrings into Markdown: lines "name: what it is" become a list, roles become code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from griffe import Object

# "bits: 4 or 8" at the left margin, several names in a row too; what goes on below it is indented
PARAMETER = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")
ROLE = re.compile(r":\w+:`~?\.?([^`]+)`")


def markdown(text: str) -> str:
    lines: list[str] = []
    listing = False
    for line in ROLE.sub(r"``\1``", text).splitlines():
        item = PARAMETER.match(line)
        continues = listing and line.startswith((" ", "\t"))
        if line.strip() and bool(item) != listing and not continues and lines and lines[-1]:
            lines.append("")  # a list begins and ends with an empty line
        if line.strip() and not continues:
            listing = bool(item)
        if item:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            lines.append(f"- {names}: {line[item.end() :]}")
        else:
            lines.append(f"  {line.strip()}" if continues else line)
    return "\n".join(lines)


class Plain(griffe.Extension):
    """Rewrite every docstring once it is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
