"""Hidden states that wait on the disk: the same tensors and bits, no memory, no file left; and what must stay where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awq_ext.forwards.memory import PeakAnonymous, anonymous_bytes, release_free_memory
from awq_ext.forwards.spill import can_spill, mapped_copy, spill

pytestmark = pytest.mark.skipif(not can_spill(), reason="NOTHING SPILLED: POSIX alone removes mapped files")
LARGE = (300, 400)


def on_disk(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_keeps_identity_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(LARGE).mul(9).to(dtype)
    inputs = ((values.clone(),), {"hidden": [values.clone()], "flag": True})
    held, inner = inputs[0][0], inputs[1]["hidden"][0]
    spill(inputs, tmp_path)
    assert inputs[0][0] is held and inputs[1]["hidden"][0] is inner
    assert on_disk(held) and on_disk(inner) and not list(tmp_path.iterdir())
    assert torch.equal(held, values) and torch.equal(inner, values)
    held.zero_()  # as any other tensor
    assert not held.any() and torch.equal(inner, values)


def test_what_shares_its_memory_stays(tmp_path: Path) -> None:
    """A view that somebody holds would go on to show, and to write, the memory of before."""
    base = torch.randn(LARGE)
    view = base[1:]
    spill((base, view), tmp_path)
    assert not on_disk(base)
    view.zero_()
    assert not base[1:].any()
    small, gradient = torch.randn(3), torch.randn(LARGE, requires_grad=True)
    spill((small, gradient, torch.randn(LARGE).T), tmp_path)
    assert not on_disk(small) and not on_disk(gradient)


def test_a_tensor_on_the_disk_is_not_written_again(tmp_path: Path) -> None:
    tensor = torch.randn(LARGE)
    spill(tensor, tmp_path)
    before = tensor.data_ptr()
    spill(tensor, tmp_path)
    assert tensor.data_ptr() == before


def test_memory_is_given_back(tmp_path: Path) -> None:
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    release_free_memory()
    before = anonymous_bytes()
    spill(tensor, tmp_path)
    release_free_memory()  # of a process that has used much, the allocator keeps it for the next
    assert anonymous_bytes() < before - (60 << 20)
    assert int(tensor[-1]) == 1


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("awq_ext.forwards.spill.os.posix_fallocate", full, raising=False)
    tensor = torch.randn(LARGE)
    with pytest.raises(OSError, match="No space left"):
        mapped_copy(tensor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_peak_of_anonymous_memory_is_seen() -> None:
    with PeakAnonymous(every=0.001) as memory:
        start = memory.bytes()
        for _ in range(5):
            big = torch.ones(64 << 20, dtype=torch.uint8)
            memory.bytes()
            del big
        assert memory.bytes() >= start + (60 << 20)
