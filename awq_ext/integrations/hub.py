"""Find the files of models by their names on the Hugging Face hub, and push models there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.formats import CheckpointError
from ..checkpoints.gguf.single import directory_of, is_gguf
from ..reporting.model_card import CARD, MARK

# everything but weights that can run code when they are read, and weights of other frameworks
_IGNORED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*")
# what Transformers' push_to_hub takes beside the name and the tags
PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
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

    For a GGUF file: see :func:`directory_of`.

    CheckpointError, in a sentence, where neither is there; ImportError without huggingface_hub.
    """
    if is_gguf(source):
        return directory_of(source)
    if Path(source).suffix.lower() == ".gguf" and not os.path.isdir(source):
        raise CheckpointError(f"{source} does not exist (a file on the Hugging Face hub has to be downloaded first)")
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


def push_folder(
    folder: Path,
    repo_id: str,
    tags: Sequence[str] = (),
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a saved model to a repository, which is made if need be; returns huggingface_hub's CommitInfo.

    The card there is replaced if there is none or one of ours, and stays if a person wrote it. ``tags`` are added to either.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _choose_card(folder, repo_id, tags, token)
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _choose_card(folder: Path, repo_id: str, tags: Sequence[str], token: str | bool | None) -> None:
    """Leave in ``folder`` the card that the repository is to have."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    path = folder / CARD
    try:
        there = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        there = None
    if there is not None and MARK not in there.content:
        there.save(path)
    if tags and path.is_file():
        card = ModelCard.load(path)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(path)
