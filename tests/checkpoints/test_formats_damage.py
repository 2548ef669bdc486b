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
    "path upwards": one_file("../outside.safetensors"),
    "all upwards": every_file("../outside.safetensors"),
    "absolute path": one_file("/outside.safetensors"),
    "path below": one_file("sub/inside.safetensors"),
    "backslash": one_file("..\\outside.safetensors"),
    "dots": one_file(".."),
    "empty name": one_file(""),
    "nul in the name": one_file("a\0b.safetensors"),
    "a pickle in the index": one_file("pytorch_model.bin"),
    "missing file": one_file("model-00009-of-00009.safetensors"),
    "link outside": link_out,
    "index no json": lambda f: (f / INDEX).write_text("{"),
    "index binary": lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"),
    "index a list": edit_index(lambda index: [1]),
    "index empty": edit_index(lambda index: {}),
    "index without files": edit_index(lambda index: index.update(weight_map={})),
    "index of numbers": edit_index(lambda index: index.update(weight_map={"a": 1})),
    "index nested deep": lambda f: (f / INDEX).write_text("[" * 100_000),
    "index names a tensor too many": edit_index(lambda i: i["weight_map"].update(extra=min(i["weight_map"].values()))),
    "two files with one tensor": lambda f: shutil.copy(shard(f, 1), shard(f, 2)),
    "cut in the header": cut(0.001),
    "cut in the data": cut(0.9),
    "empty file": cut(0),
    "a pickle by another name": content(b"\x80\x04pickle"),
    "huge header": content((2**62).to_bytes(8, "little") + b"{}"),
    "header no json": content((4).to_bytes(8, "little") + b"{{{{"),
    "offsets beyond the end": header({"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}),
    "offsets that overlap nothing": header({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}),
    "negative shape": header({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}),
    "unknown dtype": header({"dtype": "F9", "shape": [4], "data_offsets": [0, 16]}),
    "no config": lambda f: (f / "config.json").unlink(),
    "config no json": lambda f: (f / "config.json").write_text("{"),
    "config a list": config(lambda c: [1]),
    "config is a directory": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "no quantization_config": config(lambda c: c.pop("quantization_config") and None),
    "quantization_config is text": config(lambda c: c.update(quantization_config="awq")),
    "unknown method": config(lambda c: c.update(quantization_config={"quant_method": "hqq"})),
    "pickles only": pickled("pytorch_model.bin"),
    "a .pt": pickled("model.pt"),
    "an index of pickles": lambda f: (
        pickled("pytorch_model.bin")(f),
        (f / INDEX).write_text('{"weight_map": {"a": "b.bin"}}'),
    ),
    "missing float tensor": tensor_of("norm.weight", None),
    "float tensor of another shape": tensor_of("norm.weight", lambda t: t[1:]),
    "integer float tensor": tensor_of("norm.weight", lambda t: t.to(torch.int64)),
    "extra tensor": add_tensor("surplus.weight", torch.zeros(3)),
    "extra layer tensor": add_tensor("nowhere.qweight", torch.zeros(3, dtype=torch.int32)),
}
LAYER_DAMAGE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "missing": None,
    "a row less": lambda t: t[:-1],
    "of another dtype": lambda t: t.to(torch.float64),
}


def float_model() -> torch.nn.Module:
    return architectures.make("gradient checkpointing", seed=1).model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each layout, copied by the tests that spoil it."""
    torch.set_num_threads(1)
    made = {}
    for name in LAYOUTS.keys() - {"gguf"}:  # no directory of safetensors: test_gguf.py
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


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_hostile_directory_is_refused_and_the_model_untouched(
    what: str, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = spoiled(good["awq"], tmp_path / "inner", HOSTILE[what])
    assert_refused(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "what", [w for w in HOSTILE if not w.startswith(("missing float", "extra t", "float t", "integer"))]
)
def test_convert_refuses_the_same_and_writes_nothing(what: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = spoiled(good["awq"], tmp_path / "inner", HOSTILE[what])
    with pytest.raises(CheckpointError):
        awq_ext.convert(folder, tmp_path / "out", format="native")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


TENSORS = [(name, leaf) for name, each in LAYOUTS.items() if name != "gguf" for leaf in (*each.suffixes, "bias")]


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


def test_nothing_is_unpickled(good: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    awq_ext.load(float_model(), good["awq"])
