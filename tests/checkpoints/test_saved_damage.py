"""Damaged, foreign and hostile checkpoints: each a CheckpointError, and the model bit for bit as it was."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from quantized_dirs import as_version_1, edit_json, edit_tensors
from torch import Tensor

import awq_ext
from awq_ext import CheckpointError, QuantLinear

CONFIG, INDEX = "config.json", "awq_ext.json"


UP = "layers.0.mlp.up_proj"


def at(*path: str, value: Any) -> Callable[[Path], None]:
    """Set an entry of quantization_config."""

    def change(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value

    return lambda folder: edit_json(folder / CONFIG, change)


def drop(*path: str) -> Callable[[Path], None]:
    def change(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]
        for key in path[:-1]:
            entry = entry[key]
        del entry[path[-1]]

    return lambda folder: edit_json(folder / CONFIG, change)


def tensor(name: str, make: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """Replace or remove a tensor of the file."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors.pop(name)
        if make is not None:
            tensors[name] = make(old)

    return lambda folder: edit_tensors(folder, change)


def cut(share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return change


def header(content: bytes) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob("*.safetensors")).write_bytes(content)


def report(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "awq_report.json", change)


REFUSED = "`load` raises CheckpointError with the reason; the model stays as it was"
# Damage of the config of a checkpoint, of its report, and of its tensors.
SAID: dict[str, Callable[[Path], Any]] = {
    "no config": lambda f: (f / CONFIG).unlink(),
    "no json": lambda f: (f / CONFIG).write_text("{"),
    "binary config": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: edit_json(f / CONFIG, lambda _: [1]),
    "foreign json": lambda f: edit_json(f / CONFIG, lambda _: {"quant_method": "awq", "bits": 4}),
    "other method": at("quant_method", value="gptq"),
    "other bits": at("bits", value=8),
    "other bits of a layer": at("layers", UP, value=[40, 16, 8]),
    "bits that no layer has": at("layers", UP, value=[40, 16, 5]),
    "bits as bool": at("layers", UP, value=[40, 16, True]),
    "four numbers": at("layers", UP, value=[40, 16, 4, 4]),
    "newer version": at("version", value=2),
    "no version": drop("version"),
    "version as text": at("version", value="1"),
    "no layers": drop("layers"),
    "layers is a list": at("layers", value=[]),
    "no layer at all": at("layers", value={}),
    "a layer less": drop("layers", UP),
    "unknown layer": at("layers", "layers.9.mlp.up_proj", value=[40, 16]),
    "layer is the model": at("layers", "", value=[40, 16]),
    "layer is a block": at("layers", "layers.0", value=[40, 16]),
    "entry is an object": at("layers", UP, value={}),
    "entry is null": at("layers", UP, value=None),
    "no group size": at("layers", UP, value=[40]),
    "odd group size": at("layers", UP, value=[40, 17]),
    "huge group size": at("layers", UP, value=[40, 2**70]),
    "group size as bool": at("layers", UP, value=[40, True]),
    "other group size": at("layers", UP, value=[40, 64]),
    "wrong in_features": at("layers", UP, value=[41, 16]),
    "negative in_features": at("layers", UP, value=[-40, 16]),
    "in_features as text": at("layers", UP, value=["40", 16]),
    "in_features as float": at("layers", UP, value=[40.0, 16]),
    "experts is a list": at("experts", value=[]),
    "experts of a float": at("experts", "embed.weight", value="linear"),
    "in_memory is a list": at("in_memory", value=[]),
    "in_memory is null": at("in_memory", value=None),
    "no run time": drop("in_memory", "layers"),
    "a layer's run time less": drop("in_memory", "layers", UP),
    "unknown layer's run time": at("in_memory", "layers", "layers.9.mlp.up_proj", value=["float32", "auto"]),
    "unknown dtype": at("in_memory", "layers", UP, value=["int8", "auto"]),
    "dtype is a list": at("in_memory", "layers", UP, value=[[], "auto"]),
    "unknown compute dtype": at("in_memory", "layers", UP, value=["float32", "int3"]),
    "run time is text": at("in_memory", "layers", UP, value="float32"),
    "no ties": drop("in_memory", "tied"),
    "tied is a list": at("in_memory", "tied", value=[]),
    "tied to nothing": at("in_memory", "tied", "lm_head.weight", value="nothing"),
    "tied to a list": at("in_memory", "tied", "lm_head.weight", value=["embed.weight"]),
    "tied to null": at("in_memory", "tied", "lm_head.weight", value=None),
    "unknown tied name": at("in_memory", "tied", "nothing", value="embed.weight"),
    "tied to another shape": at("in_memory", "tied", "norm.weight", value="embed.weight"),
}
REPORTED: dict[str, Callable[[Path], Any]] = {
    "report is a number": report(lambda _: 5),
    "report of odd rows": report(lambda _: {"layers": [{"nothing": 1}], "blocks": []}),
    "report of odd fields": report(lambda _: {"nothing": 1}),
    "report layers is a number": report(lambda _: {"layers": 5}),
    "report is no json": lambda f: (f / "awq_report.json").write_text("{"),
}
TENSORS: dict[str, Callable[[Path], Any]] = {
    "The file of weights is missing": lambda f: next(f.glob("*.safetensors")).unlink(),
    "The file is cut off in its header": cut(0.01),
    "The file is cut off in its data": cut(0.9),
    "The file is empty": cut(0),
    "The file is a pickle": header(b"\x80\x04pickle"),
    "The header says that it is larger than the file": header((2**62).to_bytes(8, "little") + b"{}"),
    "Scales of a layer are missing": tensor(f"{UP}.scales", None),
    "Codes of a layer are missing": tensor(f"{UP}.qweight", None),
    "The embedding is missing": tensor("embed.weight", None),
    "Codes of a layer lack a row": tensor(f"{UP}.qweight", lambda t: t[1:].clone()),
    "Codes of a layer have the right bytes in another shape": tensor(f"{UP}.qweight", lambda t: t.reshape(-1).clone()),
    "The embedding lacks a column": tensor("embed.weight", lambda t: t[:, 1:].clone()),
    "Codes are integers of another size": tensor(f"{UP}.qweight", lambda t: t.to(torch.int32)),
    "Scales are in float32": tensor(f"{UP}.scales", lambda t: t.float()),
    "A zero is larger than any code": tensor(f"{UP}.zeros", lambda t: t + 16),
    "The embedding holds integers": tensor("embed.weight", lambda t: t.to(torch.int64)),
    "There is a tensor that the model lacks": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    "A layer has a bias that the model lacks": lambda f: edit_tensors(
        f, lambda t: t.update({f"{UP}.bias": torch.ones(40)})
    ),
    "A pickle lies where the weights should be": lambda f: (
        next(f.glob("*.safetensors")).unlink(),
        (f / "model.bin").write_bytes(b"\x80\x04."),
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, copied by the tests that spoil it."""
    torch.set_num_threads(1)
    case = models.make("llama")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=3, progress=False)
    return awq_ext.save(model, tmp_path_factory.mktemp("good"))


def assert_refused(folder: Path) -> None:
    model = models.Net()
    before = Snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        awq_ext.load(model, folder)
    assert len(str(caught.value)) > 20
    before.assert_unchanged()


@pytest.mark.parametrize(
    "what",
    [
        *SAID,
        *REPORTED,
        *(pytest.param(what, marks=pytest.mark.fault("Files of awq_ext.save", what, REFUSED)) for what in TENSORS),
    ],
)
def test_a_bad_checkpoint_is_refused_and_the_model_untouched(what: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "inner")
    (SAID | REPORTED | TENSORS)[what](folder)
    assert_refused(folder)


def index(*path: str, value: Any) -> Callable[[Path], None]:
    """Set an entry of awq_ext.json; ``...`` removes it."""

    def change(entry: dict[str, Any]) -> None:
        for key in path[:-1]:
            entry = entry[key]
        entry.pop(path[-1]) if value is ... else entry.update({path[-1]: value})

    return lambda folder: edit_json(folder / INDEX, change)


# The same of version 1, and a traversal: it names the file with its tensors.
SAID_1: dict[str, Callable[[Path], Any]] = {
    "no index": lambda f: (f / INDEX).unlink(),
    "no json": lambda f: (f / INDEX).write_text("{"),
    "binary index": lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: edit_json(f / INDEX, lambda _: [1]),
    "foreign json": lambda f: edit_json(f / INDEX, lambda _: {"quant_method": "awq", "bits": 4}),
    "other format": index("format", value="gptq"),
    "newer version": index("version", value=2),
    "no version": index("version", value=...),
    "version as text": index("version", value="1"),
    "no tensors": index("tensors", value=...),
    "tensors is a list": index("tensors", value=["x.safetensors"]),
    "path upwards": index("tensors", value="../outside.safetensors"),
    "absolute path": index("tensors", value="/outside.safetensors"),
    "path below": index("tensors", value="sub/inside.safetensors"),
    "no safetensors": index("tensors", value="model.bin"),
    "dots": index("tensors", value=".."),
    "missing file": index("tensors", value="model-none.safetensors"),
    "nul in the name": index("tensors", value="a\0b.safetensors"),
    "no layers": index("layers", value=...),
    "layers is a list": index("layers", value=[]),
    "no layer at all": index("layers", value={}),
    "unknown layer": index("layers", "layers.9.mlp.up_proj", value={}),
    "layer is the model": index("layers", "", value={}),
    "layer is a block": index("layers", "layers.0", value={}),
    "entry is a list": index("layers", UP, value=[]),
    "entry is null": index("layers", UP, value=None),
    "no group size": index("layers", UP, "group_size", value=...),
    "odd group size": index("layers", UP, "group_size", value=17),
    "huge group size": index("layers", UP, "group_size", value=2**70),
    "group size as bool": index("layers", UP, "group_size", value=True),
    "other group size": index("layers", UP, "group_size", value=64),
    "wrong in_features": index("layers", UP, "in_features", value=41),
    "negative in_features": index("layers", UP, "in_features", value=-40),
    "in_features as text": index("layers", UP, "in_features", value="40"),
    "in_features as float": index("layers", UP, "in_features", value=40.0),
    "unknown dtype": index("layers", UP, "dtype", value="int8"),
    "dtype is a list": index("layers", UP, "dtype", value=[]),
    "no ties": index("tied", value=...),
    "tied is a list": index("tied", value=[]),
    "tied to nothing": index("tied", "lm_head.weight", value="nothing"),
    "tied to a list": index("tied", "lm_head.weight", value=["embed.weight"]),
    "tied to null": index("tied", "lm_head.weight", value=None),
    "unknown tied name": index("tied", "nothing", value="embed.weight"),
    "experts is a list": index("experts", value=[]),
    "report is a number": index("report", value=5),
    "report of odd rows": index("report", value={"layers": [{"nothing": 1}], "blocks": []}),
    "report of odd fields": index("report", value={"nothing": 1}),
    "report layers is a number": index("report", value={"layers": 5}),
}


@pytest.mark.fault("Files of awq_ext.save", "Any of these in a directory of version 1", REFUSED)
@pytest.mark.parametrize("what", [*SAID_1, *(f"tensors: {name}" for name in TENSORS)])
def test_a_bad_checkpoint_of_version_1_is_refused_too(what: str, good: Path, tmp_path: Path) -> None:
    folder = as_version_1(shutil.copytree(good, tmp_path / "inner"))
    # what a traversal would find: a perfectly good file in a place where it has no business
    tensors = next(folder.glob("*.safetensors")).read_bytes()
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        place.write_bytes(tensors)
    (SAID_1[what] if what in SAID_1 else TENSORS[what.removeprefix("tensors: ")])(folder)
    assert_refused(folder)


@pytest.mark.fault("Files of awq_ext.save", "The checkpoint is of another model", REFUSED)
@pytest.mark.parametrize("name", ["mlp", "twice", "uncalled"])
def test_another_model_is_refused(name: str, good: Path) -> None:
    model = models.make(name).model
    before = Snapshot(model)
    with pytest.raises(CheckpointError):
        awq_ext.load(model, good)
    before.assert_unchanged()


@pytest.mark.fault("Files of awq_ext.save", "There is no such directory", "`load` raises CheckpointError")
def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        awq_ext.load(models.Net(), tmp_path / "nowhere")


def test_nothing_is_unpickled(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert isinstance(awq_ext.load(models.Net(), good).layers[0].mlp.up_proj, QuantLinear)
