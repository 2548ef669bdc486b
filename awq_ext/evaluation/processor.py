"""The name of the processor that figures were measured on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

# What tells processors apart in Linux's list, on x86 and on ARM -> what stands before the value
_DETAILS = {
    "vendor_id": "",
    "cpu family": "family ",
    "model": "model ",
    "CPU implementer": "implementer ",
    "CPU part": "part ",
}


@dataclass(frozen=True)
class Processor:
    """A processor: the name that it is sold by, and what identifies its design. A virtual machine may hide the former."""

    name: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.details)})" if self.details else self.name


def this_processor(path: Path = Path("/proc/cpuinfo")) -> Processor:
    """Read name, vendor, family and model from Linux's list of processors; elsewhere, the name that Python knows."""
    try:
        text = path.read_text()
    except OSError:
        text = ""
    first: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    known = first.get("model name") or platform.processor() or platform.machine() or "unknown"
    return Processor(known, tuple(before + first[name] for name, before in _DETAILS.items() if first.get(name)))
