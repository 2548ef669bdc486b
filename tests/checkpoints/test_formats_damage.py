"""Damaged and hostile directories of other tools' layouts: each a CheckpointError, nothing executed, nothing changed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import matrix
import pytest
import torch
from checks import Snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import LAYOUTS

INDEX = "model.safetensors.index.json"
UP = "layers.1.up"


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        changed = change(index)
        (folder / INDEX).write_text(json.dumps(index if changed is None else changed))

    return run


def every_file(name: str) -> Callable[[Path], None]:
    """The index gives ``name`` as the home of all tensors."""
    return edit_index(lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], name)))


def one_file(name: str) -> Callable[[Path], None]:
    """The index gives ``name`` as the home of one file's tensors."""

    def change(index: dict[str, Any]) -> None:
        first = min(index["weight_map"].values())
        index["weight_map"] = {k: name if v == first else v for k, v in index["weight_map"].items()}

    return edit_index(change)


def cut(share: float) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        content = shard(folder).read_bytes()
        shard(folder).write_bytes(content[: int(len(content) * share)])

    return run


def content(data: bytes) -> Callable[[Path], None]:
    return lambda folder: shard(folder).write_bytes(data) and None


def header(entry: dict[str, Any], data: bytes = b"\0" * 16) -> Callable[[Path], None]:
    text = json.dumps({"x": entry}).encode()
    return content(len(text).to_bytes(8, "little") + text + data)


def link_out(folder: Path) -> None:
    """A shard that is a link to a perfectly good file outside."""
    outside = folder.parent / "outside.safetensors"
    shard(folder).rename(outside)
    (folder / outside.name).unlink(missing_ok=True)
    shutil.copy(outside, folder.parent / "copy.safetensors")
    name = min(json.loads((folder / INDEX).read_text())["weight_map"].values())
    (folder / name).symlink_to(outside)


def pickled(name: str) -> Callable[[Path], None]:
    """Nothing but a pickle that would write a file if it were loaded."""

    def run(folder: Path) -> None:
        for file in (*folder.glob("*.safetensors"), folder / INDEX):
            file.unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(str(folder / "executed"))))

    return run


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        changed = change(values)
        (folder / "config.json").write_text(json.dumps(values if changed is None else changed))

    return run


def tensor_of(name: str, make: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        key = next(key for key in index["weight_map"] if key.endswith(name))
        path = folder / index["weight_map"][key]
        tensors = load_file(path)
        old = tensors.pop(key)
        if make is None:
            del index["weight_map"][key]
        else:
            tensors[key] = make(old).contiguous()
        save_file(tensors, path)
        (folder / INDEX).write_text(json.dumps(index))

    return run


def add_tensor(name: str, value: Tensor) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(shard(folder)) | {name: value}
        save_file(tensors, shard(folder))

    return run


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "The index names a file in the folder above": one_file("../outside.safetensors"),
    "The index gives all tensors a file in the folder above": every_file("../outside.safetensors"),
    "The index names a file by its full path": one_file("/outside.safetensors"),
    "The index names a file in a folder below": one_file("sub/inside.safetensors"),
    "The index names a file with a backslash in it": one_file("..\\outside.safetensors"),
    "The index names the folder above as a file": one_file(".."),
    "The index names a file without a name": one_file(""),
    "The index names a file with a zero byte in it": one_file("a\0b.safetensors"),
    "The index names a pickle": one_file("pytorch_model.bin"),
    "A file that the index names is missing": one_file("model-00009-of-00009.safetensors"),
    "A file is a link to one outside the directory": link_out,
    "The index is no JSON": lambda f: (f / INDEX).write_text("{"),
    "The index is no text": lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"),
    "The index is a list": edit_index(lambda index: [1]),
    "The index is an empty object": edit_index(lambda index: {}),
    "The index names no tensors": edit_index(lambda index: index.update(weight_map={})),
    "The index gives a tensor a number as its file": edit_index(lambda index: index.update(weight_map={"a": 1})),
    "The index has a hundred thousand brackets in each other": lambda f: (f / INDEX).write_text("[" * 100_000),
    "The index names a tensor that no file holds": edit_index(
        lambda i: i["weight_map"].update(extra=min(i["weight_map"].values()))
    ),
    "Two files hold a tensor of one name": lambda f: shutil.copy(shard(f, 1), shard(f, 2)),
    "A file is cut off in its header": cut(0.001),
    "A file is cut off in its data": cut(0.9),
    "A file is empty": cut(0),
    "A pickle is called .safetensors": content(b"\x80\x04pickle"),
    "A header says that it is larger than the file": content((2**62).to_bytes(8, "little") + b"{}"),
    "A header is no JSON": content((4).to_bytes(8, "little") + b"{{{{"),
    "A tensor ends behind the end of its file": header({"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}),
    "A tensor has a shape of more bytes than are there": header(
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}
    ),
    "A tensor has a negative size": header({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}),
    "A tensor has a dtype that does not exist": header({"dtype": "F9", "shape": [4], "data_offsets": [0, 16]}),
    "There is no config.json": lambda f: (f / "config.json").unlink(),
    "config.json is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config.json is a list": config(lambda c: [1]),
    "A folder is called config.json": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "config.json says nothing of a quantization": config(lambda c: c.pop("quantization_config") and None),
    "quantization_config is a text": config(lambda c: c.update(quantization_config="awq")),
    "quantization_config names a method of another tool": config(
        lambda c: c.update(quantization_config={"quant_method": "hqq"})
    ),
    "The weights are in a pickle (.bin)": pickled("pytorch_model.bin"),
    "The weights are in a pickle (.pt)": pickled("model.pt"),
    "The index names pickles only": lambda f: (
        pickled("pytorch_model.bin")(f),
        (f / INDEX).write_text('{"weight_map": {"a": "b.bin"}}'),
    ),
    "A tensor of the model is in no file": tensor_of("norm.weight", None),
    "A tensor has another shape than in the model": tensor_of("norm.weight", lambda t: t[1:]),
    "A tensor holds integers where the model has floats": tensor_of("norm.weight", lambda t: t.to(torch.int64)),
    "The files hold a tensor that the model lacks": add_tensor("surplus.weight", torch.zeros(3)),
    "The files hold one tensor of a layer that is nowhere": add_tensor(
        "nowhere.qweight", torch.zeros(3, dtype=torch.int32)
    ),
}
ONLY_A_MODEL_KNOWS = {
    "A tensor of the model is in no file",
    "A tensor has another shape than in the model",
    "A tensor holds integers where the model has floats",
    "The files hold a tensor that the model lacks",
    "The files hold one tensor of a layer that is nowhere",
}
SOME_MODELS = {"gguf", "mlx"}  # which know some architectures only: test_gguf.py, test_mlx.py
REFUSED = "`load` raises CheckpointError with the reason; the model stays as it was, nothing in the directory is run"
LAYER_DAMAGE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "is missing": None,
    "has a row less": lambda t: t[:-1],
    "has another dtype": lambda t: t.to(torch.float64),
}


def float_model() -> torch.nn.Module:
    return architectures.make("gradient checkpointing", seed=1).model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each layout, copied by the tests that spoil it."""
    torch.set_num_threads(1)
    made = {}
    for name in LAYOUTS.keys() - SOME_MODELS:
        torch.manual_seed(0)
        case = architectures.make("gradient checkpointing")
        options: dict[str, Any] = {
            "symmetric": name == "modelopt",
            "fold": "always",
            "method": "rtn",
            "progress": False,
        }
        wide = architectures.HIDDEN % 64 == 0 or name not in ("gemv_fast", "llm-awq")
        if not wide:
            options["skip"] = ("*.up",)  # 32 inputs, of which these layouts need 64
        model = awq_ext.quantize(case.model, case.batches, group_size=32, **options)
        folder = tmp_path_factory.mktemp(name)
        made[name] = awq_ext.save_pretrained(model, folder / "x", format=name, max_shard_size=3000)
    return made


def spoiled(good: Path, to: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(good, to)
    # what a traversal would find: perfectly good files in places where they have no business
    (to / "sub").mkdir()
    for place in (to.parent / "outside.safetensors", to / "sub" / "inside.safetensors"):
        shutil.copy(shard(good), place)
    change(to)
    return to


def assert_refused(folder: Path, to: Path) -> None:
    model = float_model()
    before = Snapshot(model)
    files = {p: p.stat().st_size for p in folder.rglob("*")}
    with pytest.raises(CheckpointError) as caught:
        awq_ext.load(model, folder)
    assert len(str(caught.value)) > 20
    before.assert_unchanged()
    assert {p: p.stat().st_size for p in folder.rglob("*")} == files, "nothing was executed"
    assert not to.exists()


@pytest.mark.fault("Files of a checkpoint", "{what}", REFUSED)
@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_hostile_directory_is_refused_and_the_model_untouched(
    what: str, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = spoiled(good["awq"], tmp_path / "inner", HOSTILE[what])
    assert_refused(folder, tmp_path / "out")


@pytest.mark.parametrize("what", [what for what in HOSTILE if what not in ONLY_A_MODEL_KNOWS])
def test_convert_refuses_the_same_and_writes_nothing(what: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = spoiled(good["awq"], tmp_path / "inner", HOSTILE[what])
    with pytest.raises(CheckpointError):
        awq_ext.convert(folder, tmp_path / "out", format="native")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


TENSORS = [
    (name, leaf) for name, each in LAYOUTS.items() if name not in SOME_MODELS for leaf in (*each.suffixes, "bias")
]


@pytest.mark.fault("Files of a checkpoint", "A tensor of a quantized layer {damage}, in any format", REFUSED)
@pytest.mark.parametrize(("tensor", "damage"), matrix.product(TENSORS, list(LAYER_DAMAGE), together=1), ids=str)
def test_a_damaged_layer_of_any_layout_is_refused(
    tensor: tuple[str, str], damage: str, good: dict[str, Path], tmp_path: Path
) -> None:
    name, leaf = tensor
    layer = "layers.1.down" if name in ("gemv_fast", "llm-awq") else UP
    folder = spoiled(good[name], tmp_path / "inner", tensor_of(f"{layer}.{leaf}", LAYER_DAMAGE[damage]))
    assert_refused(folder, tmp_path / "out")


def test_the_good_ones_are_good(good: dict[str, Path]) -> None:
    for folder in good.values():
        awq_ext.load(float_model(), folder)


@pytest.mark.fault("Files of a checkpoint", "Any directory at all", "Nothing is ever unpickled")
def test_nothing_is_unpickled(good: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    awq_ext.load(float_model(), good["awq"])
