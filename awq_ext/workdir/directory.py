"""WorkDirectory: the files of one quantization that can be interrupted, held by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..reporting.tables import format_bytes
from .fingerprint import Fingerprint, difference
from .tensor_file import DamagedFileError, read_tensors, write_atomically, write_tensors

try:
    import fcntl
except ImportError:  # Windows: two processes are not kept apart there
    fcntl = None

_STATE, _LOCK = "state.json", "lock"
_OURS = re.compile(r"(state\.json|lock|(block|start)-[\w-]+\.safetensors|spilled-\w+)(\.new)?")
# Of the files, and of how blocks are solved: raised where the blocks of an older directory would not be solved alike now.
_VERSION = 2


class ResumeError(RuntimeError):
    """A work directory from which this call cannot go on; the message says why."""


class WorkDirectory:
    """What a quantization has finished: a file for each block, and what was computed before the first of them.

    Made by :func:`opened`. Every file is flushed to the disk before it gets its name, so what is there is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, now: Fingerprint) -> None:
        """Note whose work this is. ResumeError, with the reason, where the directory holds finished work of another call."""
        path = self.folder / _STATE
        if not path.exists() or not _finished(self.folder):
            content = json.dumps({"version": _VERSION, "fingerprint": now}, indent=2).encode()
            write_atomically(path, lambda file: file.write(content))
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            before, version = state["fingerprint"], state["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}): {_START_OVER}") from None
        reason = difference(before, now) if version == _VERSION else "another version of awq_ext wrote it"
        if reason:
            raise ResumeError(
                f"{self.folder} holds the work of another call, which cannot be gone on with: {reason}. Make that call again, "
                f"or {_START_OVER}"
            )

    def has(self, name: str) -> bool:
        """Tell whether something was stored under this name."""
        return self._path(name).exists()

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Read what :meth:`store` wrote under this name, mapped into memory; None if it did not. ResumeError for a damaged file."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return read_tensors(path)
        except DamagedFileError as error:
            raise ResumeError(f"{error}: {_START_OVER}") from None

    def store(self, name: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Keep tensors, and values that JSON can hold, under a name such as "block-0003". OSError where the disk is full."""
        try:
            write_tensors(self._path(name), tensors, values)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"the disk is full: what is finished stays in {self.folder}; make room, and the same call goes on",
                ) from error
            raise

    def remember(
        self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[Mapping[str, Tensor], Any]:
        """Return what ``make`` returns, computed once: what is costly or random before the first block."""
        found = self.load(f"start-{name}")
        if found is None:
            found = make()
            self.store(f"start-{name}", *found)
        return found

    def check_room(self, wanted: int, what: str) -> None:
        """Raise OSError where the disk has less than ``wanted`` bytes left for ``what``."""
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise OSError(
                errno.ENOSPC,
                f"{what} needs about {format_bytes(wanted)} on the disk of {self.folder}, which has {format_bytes(free)} left: "
                "make room, or name a directory on another disk",
            )

    def remove(self) -> None:
        """Remove the directory and all that is in it; tensors that were read from it stay."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


_START_OVER = "start over with fresh=True (--fresh)"


def _finished(folder: Path) -> bool:
    """Tell whether anything was stored in a work directory; whose it is does not matter before that."""
    return any(folder.glob("*.safetensors"))


@contextmanager
def opened(folder: str | os.PathLike[str], fresh: bool = False) -> Iterator[WorkDirectory]:
    """Open a work directory while the body runs, for this process alone; it is made if need be.

    fresh: what is in it is removed first. ResumeError for a directory that another process works in, and for one that holds
    anything that is not ours, which is never removed. One in which nothing was finished is not left behind.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ResumeError(f"{path} is a file: name a directory for what is finished")
    odd = sorted(one.name for one in path.iterdir() if not _OURS.fullmatch(one.name)) if path.exists() else []
    if odd:
        raise ResumeError(f"{path} is no work directory: it holds {odd[0]}. Name a new one")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / _LOCK, "a+b") as lock:
        _take(lock, path)
        if fresh:
            for one in path.iterdir():
                if one.name != _LOCK:
                    one.unlink()
        try:
            yield WorkDirectory(path)
        finally:
            if path.exists() and {one.name for one in path.iterdir()} <= {_LOCK, _STATE}:
                shutil.rmtree(path, ignore_errors=True)


def _take(lock: IO[bytes], folder: Path) -> None:
    """Lock a file until it is closed, or the process ends in whatever way."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().decode(errors="replace").strip()
        raise ResumeError(
            f"another process{f' ({owner})' if owner else ''} works in {folder}: wait for it, or name another directory"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}".encode())
    lock.flush()
