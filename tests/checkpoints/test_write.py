"""write(): a source without files becomes a directory; what of a directory is a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same_bits
from quantized_dirs import MemorySource, random_layer
from safetensors.torch import load_file
from torch import Tensor

from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import LAYOUTS, InMemory
from awq_ext.checkpoints.quantized_dir import QuantDir
from awq_ext.checkpoints.write import _storable, is_checkpoint_file, summarize, weights_in, write

NATIVE = LAYOUTS["native"]


def written(folder: Path, source: Any, format: str = "native", limit: int = 10**9, **config: Any) -> Path:
    layout = LAYOUTS[format]
    write(folder, source, layout, summarize(source, layout, ["head"]), config, limit)
    return folder


def source(floats: dict[str, Tensor] | None = None, in_memory: InMemory | None = None) -> MemorySource:
    layers = {name: random_layer(16, 64, 32, symmetric=True) for name in ("a", "b", "c")}
    return MemorySource(layers, {"norm": torch.randn(64)} if floats is None else floats, in_memory)


def test_config_tells_what_the_tensors_are(tmp_path: Path) -> None:
    folder = written(tmp_path / "x", source(), my_key=3)
    config = json.loads((folder / "config.json").read_text())
    assert config["my_key"] == 3
    assert config["quantization_config"] == {
        "quant_method": "awq_ext",
        "bits": 4,
        "version": 1,
        "layers": {name: [64, 32] for name in "abc"},
        "experts": {},
        "modules_to_not_convert": ["head"],
    }
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_tensors_of_one_layer_stay_together(tmp_path: Path) -> None:
    made = source({f"float{i}": torch.randn(100) for i in range(5)})
    folder = written(tmp_path / "x", made, limit=900)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) == 3 + 2 + 1  # floats of 400 bytes by twos, layers of 640 one by one
    for name in "abc":
        assert len({file for tensor, file in index["weight_map"].items() if tensor.startswith(f"{name}.")}) == 1
    found = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert all(same_bits(found[name], tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize("limit", [1, 10**9])
def test_views_and_tensors_on_one_storage(limit: int, tmp_path: Path) -> None:
    """safetensors refuses what overlaps, and would write all of what a view is taken from."""
    base = torch.randn(8, 6)
    views = {
        "base": base,
        "flat": base.view(-1),
        "again": base.detach(),
        "turned": base.T,
        "some": base[2:4],
        "none": base[:0],
    }
    folder = written(tmp_path / "x", source(views), limit=limit)
    found = QuantDir(folder)
    assert all(same_bits(found.float_tensor(name), tensor) for name, tensor in views.items())


def test_tied_tensors_are_stored_once_in_the_native_layout_and_in_full_in_others(tmp_path: Path) -> None:
    tied = {f"b.{leaf}": f"a.{leaf}" for leaf in ("qweight", "scales", "zeros")}
    made = source(in_memory=InMemory(tied, {name: (torch.float32, "auto") for name in "abc"}))
    made.layers["b"] = made.layers["a"]
    native = written(tmp_path / "native", made)
    assert not any(name.startswith("b.") for name in load_file(native / "model.safetensors"))
    other = written(tmp_path / "other", made, "compressed-tensors")
    assert "in_memory" not in json.loads((other / "config.json").read_text())["quantization_config"]
    for folder in (native, other):
        found = QuantDir(folder)
        assert same_bits(found.layer("b").qweight, made.layers["a"].qweight)
        assert found.floats == ["norm"]


def test_all_that_a_layout_cannot_hold_is_said_at_once() -> None:
    made = source()
    made.layers["a"] = replace(made.layers["a"], pre_quant_scale=torch.ones(64))
    made.layers["b"] = random_layer(16, 60, 32)
    with pytest.raises(CheckpointError) as caught:
        summarize(made, LAYOUTS["awq"], [])
    text = str(caught.value)
    assert "\n  - a: its input is scaled at run time" in text
    assert "\n  - b: in_features=60 is not a multiple of group_size=32" in text
    summarize(made, NATIVE, [])


def test_the_warning_about_joined_neighbours_is_at_the_callers_line() -> None:
    made = MemorySource({"x.q_proj": random_layer(16, 64, 32)}, {})
    with pytest.warns(UserWarning, match=r"x\.q_proj: neighbours are float") as caught:
        summarize(made, LAYOUTS["awq"], ["x.k_proj"])
    assert [warning.filename for warning in caught] == [__file__]


def test_joined_neighbours_of_other_bits_are_warned_of() -> None:
    for leaves in (("gate_proj", "up_proj"), ("query", "key", "value")):
        layers = {f"x.{leaf}": random_layer(16, 64, 32) for leaf in leaves}
        summarize(MemorySource(layers, {}), LAYOUTS["compressed-tensors"], [])  # a warning would be an error
        layers |= {f"x.{leaves[0]}": random_layer(16, 64, 32, bits=8)}
        with pytest.warns(UserWarning, match=rf"x\.{leaves[0]}.*groups or bits"):
            summarize(MemorySource(layers, {}), LAYOUTS["compressed-tensors"], [])


@pytest.mark.parametrize("where", ["a layer", "another file"])
def test_an_error_while_writing_leaves_the_directory_as_it_was(where: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "x", source())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    made = source()

    def refuse(*_: Any) -> Any:
        raise RuntimeError("stop")

    if where == "a layer":
        made.layer = refuse
    with pytest.raises(RuntimeError, match="stop"):
        write(folder, made, NATIVE, summarize(made, NATIVE, []), {}, 10**9, refuse)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


NAMES = {
    "model.safetensors": (True, True),
    "model.safetensors.index.json": (True, True),
    "model-00001-of-00002.safetensors": (True, True),
    "quantize_config.json": (True, True),
    "config.json": (True, False),
    "awq_ext.json": (True, False),
    "awq_report.json": (True, False),
    "model-0123456789ab.safetensors": (True, True),
    "pytorch_model.bin": (False, True),
    "pytorch_model-00001-of-00002.bin": (False, True),
    "adapter_model.safetensors": (False, False),
    "model-1-of-2.safetensors": (False, False),
    "generation_config.json": (False, False),
    "tokenizer.json": (False, False),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_which_files_are_a_checkpoint_and_which_its_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert (is_checkpoint_file(name), weights_in(tmp_path) == [name]) == NAMES[name]


def test_floats_that_a_file_maps_are_written_without_a_copy(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    first, second = whole[:4], whole[4:]
    taken: set[int] = set()
    assert _storable(first, taken).data_ptr() == first.data_ptr()
    # the format refuses two tensors of one storage
    assert _storable(second, taken).data_ptr() != second.data_ptr()
    folder = written(tmp_path / "x", source({"first": first, "second": second}))
    stored = load_file(folder / "model.safetensors")
    assert same_bits(stored["first"], first) and same_bits(stored["second"], second)
