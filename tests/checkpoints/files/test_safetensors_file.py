"""A safetensors file, read and mapped: the same tensors, and what differs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awq_ext.checkpoints.files.safetensors_file import SafetensorsFile
from awq_ext.checkpoints.formats import CheckpointError

TENSORS = {
    "a": torch.arange(3, dtype=torch.int8),  # what follows begins at an odd address of the file
    "b": torch.randn(5, 3),
    "c": torch.randn(7).bfloat16(),
    "flags": torch.tensor([True, False]),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("way", ["read", "map"])
def test_a_tensor_is_what_was_written(path: Path, way: str) -> None:
    file = SafetensorsFile(path)
    for name, tensor in TENSORS.items():
        found = getattr(file, way)(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_what_is_read_lies_where_torch_would_put_it(path: Path) -> None:
    """Not at the odd address that it has in the file, by which a convolution is computed in another way."""
    file = SafetensorsFile(path)
    assert any(entry.begin % 64 for entry in file.tensors.values())
    for name, tensor in TENSORS.items():
        assert file.read(name).data_ptr() % 64 == 0 or not tensor.numel()


def test_writing_to_what_is_mapped_changes_no_file(path: Path) -> None:
    before = path.read_bytes()
    SafetensorsFile(path).map("b").add_(1)
    assert path.read_bytes() == before
    assert torch.equal(SafetensorsFile(path).map("b"), TENSORS["b"])


@pytest.mark.parametrize("way", ["read", "map"])
def test_a_file_that_was_cut_short_is_refused(path: Path, way: str) -> None:
    """It would kill a process that touches what is mapped."""
    file = SafetensorsFile(path)
    with open(path, "r+b") as same:
        same.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        getattr(file, way)("b")
