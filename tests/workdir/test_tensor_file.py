"""Files of tensors: every dtype and shape, whole or not at all, mapped when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import same_bits
from kills import POSIX, killed
from safetensors import safe_open

from awq_ext.workdir.tensor_file import DamagedFileError, read_tensors, write_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)


def some() -> dict[str, torch.Tensor]:
    made = {
        f"{dtype} {shape}": torch.randn(shape).mul(5).to(dtype) for dtype in DTYPES for shape in ((), (3, 7), (0, 4))
    }
    return made | {"transposed": torch.randn(5, 9).T}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    given, values = some(), {"numbers": [1.5, float("nan"), None], "text": "ä"}
    write_tensors(tmp_path / "file", given, values)
    found, told = read_tensors(tmp_path / "file")
    assert list(found) == list(given)
    assert all(same_bits(found[name], tensor) for name, tensor in given.items())
    assert told["text"] == "ä" and told["numbers"][0] == 1.5 and told["numbers"][1] != told["numbers"][1]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_tensors_are_mapped_and_lie_where_torch_would_put_them(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", some(), {})
    found, _ = read_tensors(tmp_path / "file")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel())
    found["torch.float32 (3, 7)"].zero_()  # in memory alone
    again, _ = read_tensors(tmp_path / "file")
    assert again["torch.float32 (3, 7)"].any()
    (tmp_path / "file").unlink()
    assert again["torch.int64 (3, 7)"].any()
    with pytest.raises(DamagedFileError, match="file is damaged"):
        read_tensors(tmp_path / "file")


def test_others_can_read_it_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.arange(5)}, {})
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert opened.get_tensor("a")[:40].view(torch.int64).tolist() == list(range(5))


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_cut_file_is_damaged(cut: int, tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", some(), {})
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:cut])
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_tensors(tmp_path / "file")


@POSIX
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.zeros(9)}, {})
    for step in range(1, 50):
        dead = killed(step, lambda: write_tensors(path, {"a": torch.ones(9)}, {}))
        assert read_tensors(path)[0]["a"].sum() in (0, 9)
        if not dead:
            break
    assert step > 2 and not dead and read_tensors(path)[0]["a"].sum() == 9
