"""Replace a directory by another as a whole, or files in it, or nothing at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_LONGEST_WAIT = 60.0  # seconds for another process to put its directory in place
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def replaced(
    directory: Path, stale: Callable[[str], bool], allowed: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Give a new folder to write into, which takes the place of ``directory`` when the block ends, and vanishes when it raises.

    Files of ``directory`` that the new folder lacks are taken over (as hard links where possible), except those of the top level
    whose name is ``stale``. Everything is flushed to the disk first. Where the system can exchange two directories (Linux),
    a kill at any moment leaves the old directory or the new one; elsewhere one between two renames leaves the old one under
    the name ``.NAME.old-...`` beside its place.
    Of several processes one after the other puts its folder in place. allowed: raises where ``directory`` must stay after all,
    called when no other can change it any more.
    """
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    fresh = target.with_name(f".{target.name}.partial-{_owner()}-{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        with _alone_in(target.parent):
            allowed()
            if target.is_dir():
                shutil.copymode(target, fresh)
                _take_over(target, fresh, stale)
            _flush(fresh)
            _commit(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that do the same in this folder waiting, for a minute at most.

    The lock is on the folder itself and goes with the process, so nothing is left behind. Some network file systems have none;
    there, and beside a process that was stopped, two may meet, and the later one gets an error from the system.
    """
    if fcntl is None:
        yield
        return
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + _LONGEST_WAIT
    try:
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(handle)


@contextmanager
def out_of_the_way(directory: Path, stale: Callable[[str], bool]) -> Iterator[None]:
    """Hide the top-level files of ``directory`` whose name is ``stale`` while others are written there.

    They are removed when the block ends; when it raises they are back, and what it wrote under such names is gone. For writers that
    must write in place; a kill in between leaves the files in a folder ``.replaced-...`` of the directory.
    """
    aside = directory / f".replaced-{uuid.uuid4().hex[:8]}"
    names = _names(directory, stale)
    if names:
        aside.mkdir()
    try:
        for name in names:
            (directory / name).rename(aside / name)
        yield
    except BaseException:
        for name in _names(directory, stale) if not aside.exists() or len(_names(aside, stale)) == len(names) else ():
            (directory / name).unlink()
        for name in _names(aside, stale):
            (aside / name).rename(directory / name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _names(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    files = folder.iterdir() if folder.is_dir() else ()
    return [file.name for file in files if wanted(file.name) and (file.is_symlink() or not file.is_dir())]


def _owner() -> str:
    """Name this process, so that only leftovers of dead ones are removed."""
    host = socket.gethostname().replace("-", "_") or "host"
    return f"{host}-{os.getpid()}"


def _remove_leftovers(target: Path) -> None:
    host = _owner().rpartition("-")[0]
    for left in target.parent.glob(f".{_escaped(target.name)}.partial-{_escaped(host)}-*-*"):
        pid = left.name.rsplit("-", 2)[1]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _take_over(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    for entry in old.iterdir():
        if stale(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, to: str | Path) -> None:
    """Make a hard link, or a copy on file systems without."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), to)
        return
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        # a link's target is not ours; directories can be opened for flushing on POSIX only
        if path.is_symlink() or not (path.is_file() or os.name == "posix"):
            continue
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _commit(fresh: Path, target: Path) -> None:
    inside = _working_directory(target)
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        aside = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        target.rename(aside)
        try:
            fresh.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    if os.name == "posix":
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if inside is not None and inside.is_dir():
        os.chdir(inside)  # else the process would stand in the directory that is about to be removed


def _working_directory(target: Path) -> Path | None:
    """Return the current directory if it is ``target`` or below."""
    try:
        here = Path.cwd().resolve()
    except OSError:
        return None
    return here if here == target or target in here.parents else None


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot.

    Two renames would leave a moment in which the directory is missing. A kill then could be mended by our own readers, but not by
    the others that these directories are for (Transformers, vLLM).
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
    if not done and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EPERM):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return done
