"""Read a GGUF file by itself: as a directory that has the file, and the config and tokenizer that are in it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

from ...reporting.warn import warn
from ..conversions import transformers
from .file import GGUF, opened
from .metadata import config_in

_made: dict[tuple[str, int, int], Path] = {}  # by what tells a file: path, size and time
_complete: set[Path] = set()


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Tell whether ``source`` is a GGUF file rather than a directory."""
    path = Path(source)
    return path.suffix.lower() == ".gguf" and path.is_file()


def directory_of(source: str | os.PathLike[str]) -> Path:
    """Return a directory as it is; for a GGUF file one with a config.json made of its metadata, and a link to the file.

    That directory is a temporary one, gone when the process ends; its tokenizer comes with :func:`complete`.
    CheckpointError for a damaged file, and for a model that is not known here or lacks metadata.
    """
    if not is_gguf(source):
        return Path(source)
    file = Path(source).resolve()
    state = file.stat()
    key = (str(file), state.st_size, state.st_mtime_ns)
    if key not in _made or not _made[key].is_dir():
        _made[key] = _unfolded(file)
    return _made[key]


def shown(folder: Path) -> Path:
    """Return what messages call a directory: that of :func:`directory_of` by the file it was made of."""
    return next((Path(key[0]) for key, made in _made.items() if made == folder), folder)


def _unfolded(file: Path) -> Path:
    reader = opened(file)
    config = config_in(file, reader)
    parent = Path(tempfile.mkdtemp(prefix="awq_ext-"))
    atexit.register(_remove, parent, os.getpid())
    folder = parent / file.name  # messages name the directory
    folder.mkdir()
    (folder / GGUF).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _remove(folder: Path, process: int) -> None:
    """Remove a directory at the end of the process that made it, not of one that was forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def complete(folder: Path) -> None:
    """Let transformers make the tokenizer's files in a directory of :func:`directory_of`; others are left alone.

    It takes half a minute for 100,000 tokens, and is done once. A warning where it fails.
    """
    if folder not in _made.values() or folder in _complete:
        return
    _complete.add(folder)
    kind = opened(folder / GGUF).get_field("tokenizer.ggml.model")
    if kind is None or kind.contents() in ("none", "no_vocab"):
        return
    try:
        transformers().AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(folder)
    except Exception as error:  # of code that trusts the file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"the tokenizer of {folder.name} ({kind.contents()}) cannot be read: {reason}")
