"""Find the files of models that are given by their names on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..checkpoints.formats import CheckpointError

# everything but weights that can run code when they are read, and weights of other frameworks
_IGNORED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_name(source: object) -> bool:
    """Tell whether ``source`` may be the name of a repository: ``org/name``, or a single word, and no path that exists."""
    return isinstance(source, (str, Path)) and not os.path.exists(source) and _NAME.fullmatch(str(source)) is not None


def folder_of(
    source: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a directory as it is, and for a name on the hub the directory of its files in the cache, downloaded if need be.

    CheckpointError, in a sentence, where neither is there; ImportError without huggingface_hub.
    """
    if not is_name(source) or "/" not in str(source):
        if not os.path.isdir(source):
            hint = "" if os.path.exists(source) else ", nor a name on the Hugging Face hub (org/name)"
            raise CheckpointError(f"{source} is not a directory{hint}")
        return Path(source)
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{source} is no directory; to look for it on the Hugging Face hub huggingface_hub is needed: "
            'pip install "awq-ext[hf]"'
        ) from None
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        found = huggingface_hub.snapshot_download(
            str(source), **options, local_files_only=local_files_only, ignore_patterns=list(_IGNORED)
        )
    except Exception as error:  # of a dozen kinds: no network, no such name, no permission
        raise CheckpointError(_reason(str(source), revision, error)) from error
    return Path(found)


def _reason(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    what = f"{name}, revision {revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: ask for access on huggingface.co, then give token= or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} on the Hugging Face hub has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} is neither a directory nor on the Hugging Face hub, unless it is private (token=)"
    return (
        f"{what} is no directory, is not in the cache of the Hugging Face hub, and cannot be downloaded: "
        f"{type(error).__name__}; without a network give a directory, or the cache_dir that has it"
    )
