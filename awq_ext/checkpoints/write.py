"""Write quantized layers and float tensors, from a model or from files, as a directory of some layout."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..forwards.spill import mapped_copy
from ..reporting.warn import warn
from .atomic_directory import replaced
from .files.parts import parts
from .files.read_back import verify as read_back
from .formats import CheckpointError, Facts, InMemory, Layout, PackedLinear, Summary
from .gguf.file import GGUF
from .quantized_dir import CONFIG, OTHER_CONFIGS, QUANTIZATION
from .shards import INDEX, WEIGHTS, first_json
from .version_1 import VERSION_1

REPORT = "awq_report.json"
# Bytes of a packed tensor that is worth a file of its own while a shard is collected.
_WORTH_A_FILE = 1 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SHARD_OF_VERSION_1 = re.compile(r"model-[0-9a-f]{12}\.safetensors")
_BESIDE_WEIGHTS = {CONFIG, VERSION_1, REPORT}
_WEIGHTS = {WEIGHTS, INDEX, GGUF, *OTHER_CONFIGS}

Overwrite = bool | str | os.PathLike[str]
# weights that config.json describes and that another config.json would spoil
_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model|consolidated|tf_model|flax_model)\b.*\.(bin|pth|safetensors|h5|msgpack)(\.index\.json)?"
)


class Source(Protocol):
    """What has quantized layers and float tensors: a model or a QuantDir."""

    layers: Mapping[str, Any]
    heads: Sequence[str]
    experts: Mapping[str, str]
    in_memory: InMemory | None
    floats: Iterable[str]

    def layer(self, name: str) -> PackedLinear: ...
    def outline(self, name: str) -> PackedLinear: ...
    def float_tensor(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


def parse_size(size: int | str) -> int:
    """Read a size in bytes, such as "5GB" or "300MiB"; ValueError for anything else, or less than one byte."""
    if isinstance(size, int) and not isinstance(size, bool):
        value: float = size
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
        if found is None or found[2].upper() not in _UNITS:
            raise ValueError(f'max_shard_size={size!r}: give bytes, or a number with a unit, such as "5GB"')
        value = float(found[1]) * _UNITS[found[2].upper()]
    if value < 1:
        raise ValueError(f"max_shard_size={size!r}: at least one byte is needed")
    return int(value)


def is_checkpoint_file(name: str) -> bool:
    """Tell whether a file of this name is part of a checkpoint, of whatever layout, rather than beside it."""
    return _is_weight_file(name) or name in _BESIDE_WEIGHTS or _SHARD_OF_VERSION_1.fullmatch(name) is not None


def _is_weight_file(name: str) -> bool:
    return name in _WEIGHTS or _SHARD.fullmatch(name) is not None


class TargetExistsError(CheckpointError, FileExistsError):
    """A directory that holds a checkpoint which was not to be replaced."""


def check_target(folder: Path, overwrite: Overwrite, sources: Iterable[Path | None] = ()) -> None:
    """Raise TargetExistsError where writing to ``folder`` would replace a checkpoint that ``overwrite`` does not cover.

    overwrite: False covers none, True a quantized checkpoint, the directory itself (by any path) a float one too. sources: where
    the model came from; float weights there are never replaced, as nothing else may hold them.
    """
    named = not isinstance(overwrite, bool)
    if named and not same_directory(Path(overwrite), folder):
        raise ValueError(f"overwrite={os.fspath(overwrite)!r} names another directory than {folder}")
    if folder.suffix.lower() == ".gguf" and not folder.is_dir():
        raise CheckpointError(
            f"{folder}: a directory is written in every format, in gguf one with model.gguf in it: give {folder.with_suffix('')}"
        )
    if folder.is_file():
        raise TargetExistsError(f"{folder} is a file: give a directory")
    _require_writable(folder)
    weights = weights_in(folder)
    if not weights:
        return
    if is_quantized(folder):
        if overwrite is False:
            raise TargetExistsError(
                f"{folder} holds a quantized checkpoint ({weights[0]}): write to another directory, or overwrite=True"
            )
        return
    if any(source is not None and same_directory(source, folder) for source in sources):
        raise TargetExistsError(
            f"{folder} holds the float model ({weights[0]}) that this one was made from, which would be lost: write to "
            "another directory"
        )
    if not named:
        raise TargetExistsError(
            f"{folder} holds float weights ({weights[0]}), which would be lost: write to another directory, or name it, "
            f"overwrite={str(folder)!r}"
        )


def stored_bytes(folder: Path) -> int:
    """Add up the bytes of the files of weights in a directory."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)


def _require_writable(folder: Path) -> None:
    """Raise OSError before hours of work whose result could not be written: into the parent, from where it is renamed."""
    parent = folder.resolve().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"it cannot be made: {parent} is a file", str(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"{parent} cannot be written to, where the new directory is made: choose another", str(folder)
        )


def weights_in(folder: Path) -> list[str]:
    """Name the files of weights in a directory, whoever wrote them, and those without which nobody could read them."""
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    known = (_is_weight_file, _SHARD_OF_VERSION_1.fullmatch, _OTHER_WEIGHTS.fullmatch)
    return [name for name in files if any(one(name) for one in known)]


def is_quantized(folder: Path) -> bool:
    """Tell whether a directory says of itself that its weights are quantized; one whose config is damaged does not."""
    if any((folder / name).exists() for name in (VERSION_1, *OTHER_CONFIGS)):
        return True
    try:
        config = first_json(folder, CONFIG) or {}
    except CheckpointError:
        return False
    return any(config.get(key) for key in QUANTIZATION)


def same_directory(a: Path, b: Path) -> bool:
    """Tell whether two paths are one directory, links followed."""
    return a.resolve() == b.resolve()


def summarize(
    source: Source,
    layout: Layout,
    float_linears: Iterable[str],
    so_far: str = "nothing was written",
    renamed: Mapping[str, str] | None = None,
) -> Summary:
    """Collect the facts of all layers. CheckpointError listing everything in ``source`` that ``layout`` cannot hold.

    renamed: see Summary.
    """
    facts: dict[str, Facts] = {}
    found: dict[str, list[str]] = {}
    for name in source.layers:
        layer = source.outline(name)
        facts[name] = Facts.of(layer)
        for problem in layout.problems(name, layer):
            found.setdefault(problem, []).append(name)
    in_memory = source.in_memory if layout.holds_memory else None
    summary = Summary(facts, tuple(float_linears), source.experts, in_memory, source.heads, renamed or {})
    lines = [f"{_names(names)}: {problem}" for problem, names in found.items()]
    lines += layout.model_problems(summary)
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise CheckpointError(f"the format {layout.name!r} cannot hold this model; {so_far}:\n{listed}")
    if layout.name != "native" and (odd := summary.half_joined()):
        warn(
            f"{_names(odd)}: neighbours are float or have other groups or bits, which awq_ext, AutoAWQ and Transformers can run, "
            "but servers (vLLM, SGLang, TensorRT-LLM) join q, k and v, and gate and up: give all of them the same settings"
        )
    return summary


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more layers"


def write(
    directory: Path,
    source: Source,
    layout: Layout,
    summary: Summary,
    config: Mapping[str, Any],
    max_shard_size: int,
    extra: Callable[[Path], None] = lambda folder: None,
    companions: Callable[[Path], None] = lambda folder: None,
    allowed: Callable[[], None] = lambda: None,
    spill: bool = False,
    verify: bool = False,
) -> None:
    """Write ``source`` to ``directory`` in ``layout``, atomically: shards, index, config.json with quantization_config.

    companions and extra: write further files into the folder they are given, before the weights (a GGUF file holds the tokenizer)
    and after them. allowed: see :func:`replaced`. One layer at a time is packed; one shard at a time is in memory, or with
    ``spill`` about one layer: what a shard is made of goes to files first, which are mapped. verify: read all back before the
    directory is put in place; VerificationError (see :mod:`.files.read_back`) where it differs from ``source``.
    OSError that names ``directory``, which is as it was, for a full disk and alike.
    """
    layout.foresee(source, config)
    try:
        with replaced(directory, is_checkpoint_file, allowed) as folder:
            companions(folder)
            if not layout.write_weights(folder, source, summary, config):
                tensors = (stored for _, _, stored in parts(source, layout, summary))
                _write_shards(folder, tensors, max_shard_size, spill)
            extra(folder)
            files = {
                CONFIG: layout.config(config, source, summary),
                **layout.files(summary),
            }
            texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            if verify:
                read_back(folder, directory, parts(source, layout, summary), texts)
    except (OSError, SafetensorError) as error:
        if isinstance(error, TargetExistsError):
            raise
        raise _not_written(directory, error) from error


def _not_written(directory: Path, error: OSError | SafetensorError) -> OSError:
    """Make the error for a directory that could not be written, with the system's number: OSError picks its class by it."""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
    else:  # safetensors has errors of its own, with the system's in their text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, reason = int(found[1]) if found else None, str(error)
    text = f"the checkpoint could not be written, and what was there is as it was: {reason}"
    return OSError(errno.EIO if number is None else number, text, str(directory))


def _write_shards(folder: Path, parts: Iterable[dict[str, Tensor]], limit: int, spill: bool = False) -> None:
    written: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    taken: set[int] = set()  # the storages of its tensors
    size = total = 0

    def flush() -> None:
        path = folder / f"{len(written)}.part"
        path.touch()
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes files that nobody else can read
        written.append(list(shard))
        shard.clear()
        taken.clear()

    for part in parts:
        bytes_ = sum(tensor.nbytes for tensor in part.values())
        if shard and size + bytes_ > limit:
            flush()
            size = 0
        shard.update({name: _storable(tensor, taken, folder if spill else None) for name, tensor in part.items()})
        size += bytes_
        total += bytes_
    flush()
    if len(written) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    where = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _storable(tensor: Tensor, taken: set[int], spill: Path | None = None) -> Tensor:
    """Give a tensor the form that safetensors wants: on the CPU, contiguous, in a storage of no other one, added to ``taken``.

    spill: a folder for a file to map it from, if what was made of it is large and takes memory.
    """
    packed = tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16)  # floats are mapped already, or small
    tensor = tensor.detach().to("cpu").contiguous()
    if spill is not None and packed and tensor.nbytes >= _WORTH_A_FILE:
        tensor = mapped_copy(tensor, spill)
    # a part of a larger storage is written as it is: a copy of what a file maps would take memory until the shard is written
    if tensor.untyped_storage().data_ptr() in taken:
        tensor = tensor.clone()
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor
