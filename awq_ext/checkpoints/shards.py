"""Read the safetensors files of a directory as one set of named tensors, one at a time. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files.safetensors_file import SafetensorsFile
from .formats.packed import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_DEEPEST = 100  # of objects in each other, in JSON; configs have fewer than ten


class Shards:
    """Names, dtypes and shapes of all tensors in the safetensors files of ``folder``; :meth:`get` reads one.

    The files are those given, else those of the index, else model.safetensors, else every *.safetensors. CheckpointError for
    files that are missing, damaged or outside the folder, for a name that two files have, and for a directory with pickles only.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, str] = {}
        files, listed = self._listed() if files is None else (files, {})
        for file in files:
            self._open(file)
        for name, file in listed.items():
            if self._home.get(name) != file:
                raise CheckpointError(f"{folder / INDEX} says that {name} is in {file}, which it is not")

    def _listed(self) -> tuple[list[str], dict[str, str]]:
        """List the files to open, and tensor name -> file where there is an index."""
        path = self.folder / INDEX
        if path.exists():
            weights = read_json(path).get("weight_map")
            if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
                raise CheckpointError(f"{path} is damaged: weight_map must map tensor names to files")
            return sorted(set(weights.values())), weights
        if (self.folder / WEIGHTS).exists():
            return [WEIGHTS], {}
        if found := sorted(file.name for file in self.folder.glob("*.safetensors")):
            return found, {}
        if pickles := sorted(file.name for suffix in PICKLES for file in self.folder.glob(f"*{suffix}")):
            raise CheckpointError(
                f"{self.folder} has its tensors in {pickles[0]}, a pickle, which can run any code when it is read: "
                "only safetensors are read; get the checkpoint in that form from a source you trust"
            )
        raise CheckpointError(f"{self.folder} has no safetensors file: it is no checkpoint")

    def _open(self, file: str) -> None:
        path = self._inside(file)
        self._files[file] = opened = SafetensorsFile(path)
        for name in opened.tensors:
            if name in self._home:
                raise CheckpointError(f"{self.folder}: {name} is in two files, {self._home[name]} and {file}")
            self._home[name] = file

    def _inside(self, file: str) -> Path:
        """Check that a file lies in the folder (or in the blob store of a Hugging Face cache, which it links to); its path."""
        problem = f"{self.folder / INDEX} names {file!r}: a .safetensors file of this directory is needed"
        if not file.endswith(".safetensors") or Path(file).name != file or "\0" in file or "\\" in file:
            raise CheckpointError(problem)
        path, folder = self.folder / file, self.folder.resolve()
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        cached = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
        if real.parent != folder and not cached:
            raise CheckpointError(f"{path} is a link to {real}, outside the directory")
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def dtype(self, name: str) -> torch.dtype:
        """Tell the dtype without reading the tensor; CheckpointError for one that torch lacks."""
        entry = self._files[self._home[name]].tensors[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.folder}: {name} has dtype {entry.kind}, which is not known here")
        return entry.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape without reading the tensor."""
        return self._files[self._home[name]].tensors[name].shape

    def home(self, name: str) -> str:
        """Name the file that has a tensor."""
        return self._home[name]

    def get(self, name: str) -> Tensor:
        """Read a tensor, to the CPU. CheckpointError where the file has changed since, MemoryError where there is none."""
        return self._files[self._home[name]].read(name)

    stored = get  # as the file has it

    def map(self, name: str) -> Tensor:
        """Map a tensor into memory, on the CPU: writing to it changes no file. CheckpointError where the file has changed."""
        return self._files[self._home[name]].map(name)

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
        """Sort the tensors, or those ``names``, by module: see :func:`by_module`."""
        return by_module(self if names is None else names)


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort tensors by module: its name -> last part of the tensor's name -> the tensor's name."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        modules.setdefault(prefix, {})[leaf] = name
    return modules


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError if it cannot be read or is none."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise CheckpointError(f"{path} is no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: nested deeper than {_DEEPEST} levels") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: an object is needed, not {type(content).__name__}")
    if _depth(content) > _DEEPEST:  # those who walk through it recurse
        raise CheckpointError(f"{path} is damaged: nested deeper than {_DEEPEST} levels")
    return content


def _depth(content: Any) -> int:
    """Count the levels of objects and lists in each other."""
    level, depth = [content], 0
    while level:
        depth += 1
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [value for value in inner if isinstance(value, (dict, list))]
    return depth


def first_json(folder: Path, *names: str) -> Mapping[str, Any] | None:
    """Read the first of these files that exists; None if there is none."""
    return next((read_json(folder / name) for name in names if (folder / name).exists()), None)
