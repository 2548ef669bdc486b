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
    """Return the bytes of physical memory that the process holds now, or its peak where the system (not Linux) tells only that."""
    return _status_bytes("VmRSS") if _STATUS.exists() else _peak_of_life()


def _peak_of_life() -> int:
    if resource is None:
        return 0
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_free_memory() -> None:
    """Give freed memory back to the system, where the allocator can do that on demand (glibc).

    Hidden states are freed in another order than they are allocated in, so the heap would stay as large as when it was most
    fragmented.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class FreeMemory:
    """Gives freed memory back to the system once the process has grown by ``slack`` bytes, and not before.

    So much more than is in use the heap may hold. If it were given back after every sample, the forwards of small models would
    take half as long again, because their pages would be mapped anew each time.
    """

    def __init__(self, slack: int = 16 << 20) -> None:
        self._slack = slack
        self._held = resident_bytes()

    def release_if_grown(self) -> None:
        """Give free memory back if the process has grown; to be called wherever much may have been freed."""
        now = resident_bytes()
        if now > self._held + self._slack:
            release_free_memory()
            now = self._held = resident_bytes()
        self._held = min(self._held, now)


class PeakMemory:
    """Measures the peak of host memory since it was made, or that of a GPU."""

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
        """Return the peak so far. Where the system cannot reset its mark, that is the peak of the whole life of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") if self._resets else _peak_of_life()
