"""Text for the demo: the source of the running Python's own standard library, as bytes.

It is on every machine that can run the demo, it is a few megabytes long, and nobody has to download anything. A module
belongs to a split by a hash of its relative path, never by chance or by order: the shipped weights were trained on one
Python, and whatever Python runs the demo finds held-out modules that the training did not see.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "calibration", "held-out"]
# Not text that somebody wrote to be read: tests, generated tables, grammars, vendored wheels, other people's packages
SKIPPED_FOLDERS = frozenset(
    [
        *("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"),
        *("ensurepip", "__pycache__", "pydoc_data", "turtledemo", "lib-dynload", "__phello__", "msilib"),
    ]
)
SKIPPED_FILES = re.compile(r"(^|/)(_sysconfigdata.*|stringprep|entities|antigravity)\.py$|config-")
# Out of 100 hash values: 0-4 held out, 5-9 calibration, the rest training
HELD_OUT_BELOW, CALIBRATION_BELOW = 5, 10
LONGEST_FILE = 400_000  # a longer file is a generated one


class NoSourceError(RuntimeError):
    """The running Python has no readable standard library source."""


def split_of(relative_path: str) -> Split:
    """The split a module belongs to, from its path relative to the standard library (``json/decoder.py``)."""
    value = zlib.crc32(relative_path.replace("\\", "/").encode()) % 100
    if value < HELD_OUT_BELOW:
        return "held-out"
    return "calibration" if value < CALIBRATION_BELOW else "train"


@lru_cache(maxsize=4)
def modules(root: str | None = None) -> dict[str, Path]:
    """Relative path -> file of every module that counts as text, sorted by relative path."""
    base = Path(root or sysconfig.get_path("stdlib"))
    found = {}
    for file in base.rglob("*.py"):
        relative = file.relative_to(base)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or SKIPPED_FILES.search(name):
            continue
        if 0 < file.stat().st_size <= LONGEST_FILE:
            found[name] = file
    if not found:
        raise NoSourceError(
            f"no Python source files under {base}: the demo's text is the source of the standard library, which some "
            "minimal Python builds leave out. Run it with a Python that has its Lib/*.py files."
        )
    return dict(sorted(found.items()))


@lru_cache(maxsize=8)
def text(split: Split, root: str | None = None) -> bytes:
    """All modules of a split, one after the other in the order of their hash, each ended by a zero byte."""
    chosen = [name for name in modules(root) if split_of(name) == split]
    # in alphabetical order, evenly spaced windows would still be fine, but neighbours would share a package
    chosen.sort(key=lambda name: zlib.crc32(b"order:" + name.encode()))
    joined = b"\0".join(modules(root)[name].read_bytes().replace(b"\r\n", b"\n") for name in chosen)
    if not joined:
        raise NoSourceError(f"no module of the standard library falls into the split {split!r}")
    return joined


def tokens(split: Split, root: str | None = None) -> Tensor:
    """The text of a split as token numbers: uint8 [length]."""
    return torch.frombuffer(bytearray(text(split, root)), dtype=torch.uint8)


def windows(stream: Tensor, count: int, length: int) -> Tensor:
    """``count`` evenly spaced windows of a stream [n], not overlapping if it is long enough: int64 [count, length]."""
    last = stream.numel() - length
    if last < 0:
        raise NoSourceError(f"the text has {stream.numel()} bytes, fewer than one window of {length}")
    starts = torch.linspace(0, last, count).long() if count > 1 else torch.zeros(1, dtype=torch.long)
    return stream[starts[:, None] + torch.arange(length)].long()


def calibration_batches(count: int = 16, batch: int = 8, length: int = 256) -> list[Tensor]:
    """What ``quantize`` is shown: ``count`` batches of int64 [batch, length] from modules used for nothing else."""
    return list(windows(tokens("calibration"), count * batch, length).split(batch))


def held_out_tokens(limit: int, length: int = 256) -> Tensor:
    """Windows to score, about ``limit`` tokens in all and never more than the text has: int64 [count, length]."""
    stream = tokens("held-out")
    count = max(1, min(limit, stream.numel()) // length)
    return windows(stream, count, length)
