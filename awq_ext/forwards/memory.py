"""Memory of this process: how much is in use, and the peak since a mark."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not a Unix: peaks then read as 0
    resource = None


_STATUS = Path("/proc/self/status")
# What the process may hold beyond what is in use before free memory is given back, in bytes.
SLACK = 16 << 20


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

    def __init__(self, slack: int = SLACK) -> None:
        self._slack = slack
        self._held = resident_bytes()

    def release_if_grown(self) -> None:
        """Give free memory back if the process has grown; to be called wherever much may have been freed."""
        now = resident_bytes()
        if now > self._held + self._slack:
            release_free_memory()
            now = self._held = resident_bytes()
        self._held = min(self._held, now)


def anonymous_bytes() -> int:
    """Return the bytes held beside mapped files, which the system can drop and read again; all bytes where it is not Linux."""
    return _status_bytes("RssAnon") if _STATUS.exists() else resident_bytes()


def available_bytes() -> int:
    """Return the bytes of memory that this process could take now without swapping: Linux only, else 0."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    return min([free, *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    """Yield what the control groups of this process (containers, batch jobs) leave it, page cache not counted."""
    with suppress(OSError, ValueError):
        place = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / place, Path("/sys/fs/cgroup")):
            limit = folder / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, int(text) - int(used["anon"]))


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
        self.start = self.now()

    def now(self) -> int:
        """Return the bytes in use now."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else resident_bytes()

    def bytes(self) -> int:
        """Return the peak so far. Where the system cannot reset its mark, that is the peak of the whole life of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") if self._resets else _peak_of_life()


class PeakAnonymous:
    """Measures the peak of :func:`anonymous_bytes`, of which the kernel keeps no mark: a thread looks every few milliseconds.

    To be used as a context manager, whose end ends the thread.
    """

    def __init__(self, every: float = 0.01) -> None:
        self.start = self._peak = anonymous_bytes()
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="awq_ext-memory", daemon=True)

    def now(self) -> int:
        """Return the bytes in use now."""
        return anonymous_bytes()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self._peak = max(self._peak, anonymous_bytes())

    def bytes(self) -> int:
        """Return the peak so far."""
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
