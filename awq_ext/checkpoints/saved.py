"""Save and load quantized models: safetensors for the tensors, JSON for the structure. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..layers.quant_linear import TILED, QuantLinear
from ..modules import unwrapped
from ..reporting.report import AwqReport
from ..standins.standins import stand_in_as
from ..undo import interrupt
from ..undo.journal import Journal
from .fill import place
from .formats.packed import CheckpointError
from .index import INDEX_NAME, empty_layer, index_of, read_index
from .quantized_dir import QuantDir
from .renaming import Renamed
from .shards import PICKLES


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write ``model`` (quantized) to ``directory``: ``awq_ext.json`` and one safetensors file. Returns the directory.

    All parameters and buffers are stored, those outside ``state_dict`` too (rotary tables), tied ones once. The JSON is renamed
    into place last and names the tensor file, so a reader sees the old checkpoint or the new one, never a mixture.
    Raises CheckpointError when the model holds no QuantLinear or tensors on the meta device.
    """
    model = unwrapped(model)
    if not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__} holds no QuantLinear: quantize it first (fake-quantized models, packed=False, "
            "are ordinary float models: use torch.save or save_pretrained)"
        )
    if meta := [name for name, tensor in _named_tensors(model) if tensor.is_meta]:
        raise CheckpointError(f"{meta[0]} is on the meta device: it has no values to save")
    tensors, tied = _unique_tensors(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    before = _tensor_files(folder)
    tensor_file = f"model-{uuid.uuid4().hex[:12]}.safetensors"
    index = index_of(model, tensor_file, tied)
    _write(folder / tensor_file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write(folder / INDEX_NAME, lambda path: path.write_text(json.dumps(index, indent=1)))
    for old in before:
        old.unlink(missing_ok=True)
    return folder


def load(model: nn.Module | Callable[[], nn.Module], directory: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the quantized layers and all tensors of a checkpoint; returns it.

    directory: what :func:`save` wrote, or a checkpoint of any layout in ``awq_ext.formats.LAYOUTS`` whose tensors have the names
        that ``model`` has for them.
    model: the float model's structure (its values do not matter; ``torch.device("meta")`` is fine), or a function that builds
        it. Tensors land on the device of what they replace (meta: the CPU), with the bits and dtypes that were saved.
    Raises CheckpointError, before anything is changed, for a damaged or foreign checkpoint or one of another model.
    """
    folder = Path(directory)
    given = model if isinstance(model, nn.Module) else model()
    target = unwrapped(given)
    if not (folder / INDEX_NAME).exists() and _is_foreign(folder):
        place(target, Renamed(QuantDir(folder), target))
        return given
    index = read_index(folder)
    tensors = _read_tensors(folder / index["tensors"])
    with Journal() as journal:
        _take_apart(target, index, journal)
        _fill(target, index, tensors)
    if index["report"] is not None:
        target.awq_report = index["report"]
    return given


def _take_apart(model: nn.Module, index: dict[str, Any], journal: Journal) -> None:
    """Give ``model`` the Linears that the layers of the checkpoint were made from."""
    entries = {name: entry for name, entry in index["layers"].items() if isinstance(entry, dict)}
    sizes = {name: (entry.get("in_features"), entry.get("out_features")) for name, entry in entries.items()}
    try:
        stand_in_as(model, sizes, index.get("experts", {}), journal)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _fill(target: nn.Module, index: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    skeleton = {name: empty_layer(target, name, entry) for name, entry in index["layers"].items()}
    plan = _match(target, skeleton, tensors, index["tied"])
    values = _placed(target, skeleton, plan, tensors)
    for name, layer in skeleton.items():
        target.set_submodule(name, layer)
    for name, value in values.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = target.get_submodule(parent_name)
        (parent._parameters if leaf in parent._parameters else parent._buffers)[leaf] = value


def _is_foreign(folder: Path) -> bool:
    """Whether there is anything of another layout, or a pickle, which QuantDir refuses with its reason."""
    files = set(folder.iterdir()) - set(_tensor_files(folder)) if folder.is_dir() else set()
    return any(file.suffix in (".safetensors", *PICKLES) for file in files)


def read_report(directory: str | os.PathLike[str]) -> AwqReport:
    """The report of the quantization that made a checkpoint. CheckpointError where there is none."""
    report = read_index(Path(directory))["report"]
    if report is None:
        raise CheckpointError(f"{directory} holds no report: its model was not quantized by awq_ext.quantize")
    return report


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, buffers outside state_dict included, int4 layers by rows."""
    yield from model.named_parameters(remove_duplicate=False)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
    rows: dict[int, Tensor] = {}  # by the buffer they are made of: what shares one shares the other
    leaves = {buffer: leaf for leaf, buffer in TILED.items()}
    for name, tensor in model.named_buffers(remove_duplicate=False):
        prefix, _, buffer = name.rpartition(".")
        if prefix not in layers or buffer not in leaves:
            yield name, tensor
            continue
        leaf = leaves[buffer]
        if id(tensor) not in rows:
            rows[id(tensor)] = layers[prefix].to_rows(leaf)
        yield f"{prefix}.{leaf}".lstrip("."), rows[id(tensor)]


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store (contiguous, on the CPU) and name -> stored name for those that share them."""
    first: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        stored = tensor.detach().cpu().contiguous()
        storage = stored.untyped_storage()
        # safetensors refuses tensors that overlap, and would write the whole base of a view
        if storage.data_ptr() in storages or storage.nbytes() != stored.nbytes:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
    return tensors, tied


def _tensor_files(folder: Path) -> list[Path]:
    """The tensor file of the checkpoint that is in ``folder`` now, and leftovers of interrupted saves."""
    return [*folder.glob("model-????????????.safetensors"), *folder.glob(".*.partial")]


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write to a temporary name, flush to disk, rename: the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _match(
    model: nn.Module, layers: dict[str, QuantLinear], tensors: dict[str, Tensor], tied: dict[str, str]
) -> dict[str, str]:
    """Name in the model -> name in the file, for every tensor the loaded model will have; all shapes and dtypes checked."""
    wanted: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(model):
        if name.rpartition(".")[0] not in layers:
            wanted[name] = tensor
    for prefix, layer in layers.items():
        wanted |= {f"{prefix}.{leaf}": tensor for leaf, tensor in _named_tensors(layer)}
    stored = {name: name for name in tensors} | tied
    if missing := sorted(set(wanted) - set(stored)):
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of the model, among them {missing[0]}")
    if extra := sorted(set(stored) - set(wanted)):
        raise CheckpointError(f"the checkpoint has {len(extra)} tensors that the model lacks, among them {extra[0]}")
    for name, source in stored.items():
        if source not in tensors:
            raise CheckpointError(f"{name} is tied to {source!r}, which the file does not hold")
        if wanted[name].shape != tensors[source].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensors[source].shape)} in the file, {tuple(wanted[name].shape)} in the model"
            )
        quantized = name.rpartition(".")[0] in layers
        same_kind = wanted[name].is_floating_point() == tensors[source].is_floating_point()
        if not same_kind or (quantized and wanted[name].dtype != tensors[source].dtype):
            raise CheckpointError(f"{name} has dtype {tensors[source].dtype} in the file, not {wanted[name].dtype}")
    return stored


def _placed(
    model: nn.Module, layers: dict[str, QuantLinear], plan: dict[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The objects to put in the model, on the device of what they replace; tied names get one and the same object."""
    made: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    for name, source in plan.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        rows = leaf if parent_name in layers and leaf in TILED else None
        old = None if rows else parent._parameters.get(leaf, parent._buffers.get(leaf))
        # tensors that only the quantized layer has go where the Linear's weight is
        near = old if old is not None else next(iter((*parent.parameters(), *parent.buffers())), None)
        if source not in made:
            interrupt.check()
            tensor = tensors[source]
            if near is not None and not near.is_meta:
                tensor = tensor.to(near.device)
            if rows:
                tensor = _tiles(layers[parent_name], name, rows, tensor)
            trained = leaf in parent._parameters
            made[source] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad) if trained else tensor
        placed[f"{parent_name}.{TILED[rows]}".lstrip(".") if rows else name] = made[source]
    return placed


def _tiles(layer: QuantLinear, name: str, leaf: str, rows: Tensor) -> Tensor:
    try:
        return layer.to_tiles(leaf, rows)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
