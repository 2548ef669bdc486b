"""Parcels: what goes in comes out, at addresses like those of torch's own tensors."""

from __future__ import annotations

import pytest
import torch

from awq_ext.distributed.parcel import pack, unpack

TENSORS = {
    "halves": torch.arange(7, dtype=torch.bfloat16),
    "nothing": torch.empty(0, 3),
    "one": torch.tensor(True),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "numbers": torch.tensor([[1, -2]]),
}


def test_what_goes_in_comes_out() -> None:
    tensors, values = unpack(pack(TENSORS, {"a": [1, None, "é"]}))
    assert values == {"a": [1, None, "é"]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_nothing_is_a_parcel_too() -> None:
    assert unpack(pack({})) == ({}, None)


@pytest.mark.parametrize("length", [1, 50, 200])
def test_every_tensor_begins_where_torch_would_let_it_begin(length: int) -> None:
    """Whatever the length of what is written before them."""
    parcel = pack(TENSORS, "x" * length)
    assert parcel.data_ptr() % 64 == 0
    assert [name for name, one in unpack(parcel)[0].items() if one.numel() and one.data_ptr() % 64] == []


def test_a_parcel_is_a_copy() -> None:
    tensor = torch.ones(3)
    parcel = pack({"x": tensor})
    tensor.zero_()
    assert torch.equal(unpack(parcel)[0]["x"], torch.ones(3))
