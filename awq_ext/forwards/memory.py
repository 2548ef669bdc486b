"""Memory of this process: how much is in use, and the peak since a mark."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not a Unix: peaks then read as 0
    resource = None


_STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident_bytes() -> int:
    """Bytes of physical memory that the process holds now (Linux), or its peak where the system tells only that."""
    return _status_bytes("VmRSS") if _STATUS.exists() else _peak_of_life()


def _peak_of_life() -> int:
    if resource is None:
        return 0
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_free_memory() -> None:
    """Give freed memory back to the system where the allocator can be told to (glibc).

    Hidden states are freed in one order and allocated in another; the heap would stay as large as its most fragmented moment.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class FreeMemory:
    """Freed memory, given back to the system only once the process has grown by ``slack`` bytes since it last was.

    A heap may hold so much more than is in use; giving it back after every sample would cost small models half as much again
    as their forwards, whose pages then have to be mapped anew each time.
    """

    def __init__(self, slack: int = 16 << 20) -> None:
        self._slack = slack
        self._held = resident_bytes()

    def release_if_grown(self) -> None:
        """Call this wherever much may have been freed; where the heap has not grown it only looks."""
        now = resident_bytes()
        if now > self._held + self._slack:
            release_free_memory()
            now = self._held = resident_bytes()
        self._held = min(self._held, now)


class PeakMemory:
    """Peak of host memory (and of one GPU's) since construction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            # "5" resets the peak resident size that the kernel keeps for this process (man 5 proc)
            Path("/proc/self/clear_refs").write_text("5")
            self._resets = True
        except OSError:
            self._resets = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.start = self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else resident_bytes()

    def bytes(self) -> int:
        """The peak so far. Where the system cannot reset its mark, the peak of the whole life of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") if self._resets else _peak_of_life()
