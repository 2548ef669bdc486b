"""Members: the tensors that transformers makes one of, or one that it divides; their order, and which are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Member:
    """A tensor that a converter takes: its name, the pattern it fits, and what it consists of: sources with their rows.

    sources are empty for a float tensor that is converted as it is.
    """

    name: str
    pattern: str
    sources: dict[str, int] = field(default_factory=dict)
    stacked: bool = False


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 2 comes before expert 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def absent_experts(members: Iterable[Member], count: int = 0) -> list[str]:
    """Names of the experts that are missing among ``members``, of 0 to the highest number there, or of ``count``."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for member in members:
        pattern = re.sub(r"\\?\*\\?\.", r"(\\d+)\\.", member.pattern, count=1)
        if "*" in member.pattern and (match := re.search(pattern, member.name)) and match.lastindex == 1:
            around = (member.pattern, member.name[: match.start(1)], member.name[match.end(1) :])
            found.setdefault(around, set()).add(int(match[1]))
    count = max([count, *(number + 1 for numbers in found.values() for number in numbers)], default=0)
    return [f"{a}{e}{b}" for (_, a, b), numbers in found.items() for e in range(count) if e not in numbers]
