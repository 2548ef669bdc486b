"""Damaged, foreign and hostile checkpoints: each a CheckpointError, and the model bit for bit as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_ext
from awq_ext import CheckpointError, QuantLinear

INDEX = "awq_ext.json"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    result = change(index)
    (folder / INDEX).write_text(json.dumps(index if result is None else result))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UP = "layers.0.mlp.up_proj"


def at(*path: str, value: Any) -> Callable[[Path], None]:
    """Set an entry of the index."""

    def change(index: dict[str, Any]) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = value

    return lambda folder: edit_index(folder, change)


def drop(*path: str) -> Callable[[Path], None]:
    def change(index: dict[str, Any]) -> None:
        for key in path[:-1]:
            index = index[key]
        del index[path[-1]]

    return lambda folder: edit_index(folder, change)


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


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "no index": lambda f: (f / INDEX).unlink(),
    "no json": lambda f: (f / INDEX).write_text("{"),
    "binary index": lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: edit_index(f, lambda _: [1]),
    "foreign json": lambda f: edit_index(f, lambda _: {"quant_method": "awq", "bits": 4}),
    "other format": at("format", value="gptq"),
    "newer version": at("version", value=2),
    "no version": drop("version"),
    "version as text": at("version", value="1"),
    "no tensors": drop("tensors"),
    "tensors is a list": at("tensors", value=["x.safetensors"]),
    "path upwards": at("tensors", value="../outside.safetensors"),
    "absolute path": at("tensors", value="/outside.safetensors"),
    "path below": at("tensors", value="sub/inside.safetensors"),
    "no safetensors": at("tensors", value="model.bin"),
    "dots": at("tensors", value=".."),
    "missing file": at("tensors", value="model-none.safetensors"),
    "nul in the name": at("tensors", value="a\0b.safetensors"),
    "no layers": drop("layers"),
    "layers is a list": at("layers", value=[]),
    "no layer at all": at("layers", value={}),
    "unknown layer": at("layers", "layers.9.mlp.up_proj", value={}),
    "layer is the model": at("layers", "", value={}),
    "layer is a block": at("layers", "layers.0", value={}),
    "entry is a list": at("layers", UP, value=[]),
    "entry is null": at("layers", UP, value=None),
    "no group size": drop("layers", UP, "group_size"),
    "odd group size": at("layers", UP, "group_size", value=17),
    "huge group size": at("layers", UP, "group_size", value=2**70),
    "group size as bool": at("layers", UP, "group_size", value=True),
    "other group size": at("layers", UP, "group_size", value=64),
    "wrong in_features": at("layers", UP, "in_features", value=41),
    "negative in_features": at("layers", UP, "in_features", value=-40),
    "in_features as text": at("layers", UP, "in_features", value="40"),
    "in_features as float": at("layers", UP, "in_features", value=40.0),
    "unknown dtype": at("layers", UP, "dtype", value="int8"),
    "dtype is a list": at("layers", UP, "dtype", value=[]),
    "scale dtype": at("layers", UP, "scale_dtype", value="bfloat16"),
    "bias where none is": at("layers", UP, "bias", value=True),
    "bias as number": at("layers", UP, "bias", value=1),
    "input scale": at("layers", UP, "pre_quant_scale", value=True),
    "tied is a list": at("tied", value=[]),
    "tied to nothing": at("tied", "lm_head.weight", value="nothing"),
    "tied to a list": at("tied", "lm_head.weight", value=["embed.weight"]),
    "tied to null": at("tied", "lm_head.weight", value=None),
    "unknown tied name": at("tied", "nothing", value="embed.weight"),
    "report is a number": at("report", value=5),
    "report of odd rows": at("report", value={"layers": [{"nothing": 1}], "blocks": []}),
    "report of odd fields": at("report", value={"nothing": 1}),
    "report layers is a number": at("report", value={"layers": 5}),
    "cut in the header": cut(0.01),
    "cut in the data": cut(0.9),
    "empty file": cut(0),
    "no safetensors content": header(b"\x80\x04pickle"),
    "huge header": header((2**62).to_bytes(8, "little") + b"{}"),
    "missing tensor": tensor(f"{UP}.scales", None),
    "missing float tensor": tensor("embed.weight", None),
    "wrong shape": tensor(f"{UP}.qweight", lambda t: t[1:].clone()),
    "same bytes in another shape": tensor(f"{UP}.qweight", lambda t: t.reshape(-1).clone()),
    "wrong shape of a float tensor": tensor("embed.weight", lambda t: t[:, 1:].clone()),
    "wrong dtype of codes": tensor(f"{UP}.qweight", lambda t: t.to(torch.int32)),
    "wrong dtype of scales": tensor(f"{UP}.scales", lambda t: t.float()),
    "integer embedding": tensor("embed.weight", lambda t: t.to(torch.int64)),
    "extra tensor": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, copied by the tests that spoil it."""
    torch.set_num_threads(1)
    case = models.make("llama")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=3, progress=False)
    return awq_ext.save(model, tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_bad_checkpoint_is_refused_and_the_model_untouched(what: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    # what a traversal would find: a perfectly good file in a place where it has no business
    tensors = next(folder.glob("*.safetensors")).read_bytes()
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        place.write_bytes(tensors)
    HOSTILE[what](folder)
    model = models.Net()
    before = Snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        awq_ext.load(model, folder)
    assert len(str(caught.value)) > 20
    before.assert_unchanged()


@pytest.mark.parametrize("name", ["mlp", "twice", "uncalled"])
def test_another_model_is_refused(name: str, good: Path) -> None:
    model = models.make(name).model
    before = Snapshot(model)
    with pytest.raises(CheckpointError):
        awq_ext.load(model, good)
    before.assert_unchanged()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has no {INDEX}"):
        awq_ext.load(models.Net(), tmp_path / "nowhere")


def test_nothing_is_unpickled(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert isinstance(awq_ext.load(models.Net(), good).layers[0].mlp.up_proj, QuantLinear)
