"""Inputs of modules: copies that share nothing that could be written, sizes, and tensors that are the same."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from awq_ext.forwards.inputs import copy_inputs, linear_input, tensor_bytes, tensor_identity


def test_copies_keep_shared_tensors_shared() -> None:
    x = torch.ones(2)
    (a, b), c = copy_inputs(((x, x), {"x": torch.zeros(1), "n": 3}))
    assert a is b
    assert a is not x
    assert c["n"] == 3


class Ledger:
    """A cache in the manner of the attention caches: tensors in lists in objects, and a reference to itself."""

    def __init__(self) -> None:
        self.pages: list[Any] = [torch.zeros(2)]
        self.me = self
        self.module = nn.Linear(2, 2)
        self.done = {"layer": False}


def test_copies_cannot_write_what_they_are_copies_of() -> None:
    ledger, x = Ledger(), torch.ones(3)
    parameter = nn.Parameter(torch.ones(2))
    args, kwargs = copy_inputs(((ledger, x, parameter, torch.relu), {"again": x, "ledger": ledger}))
    copied = args[0]
    assert copied is not ledger
    assert copied is kwargs["ledger"] is copied.me
    assert args[1] is kwargs["again"]
    assert copied.module is ledger.module
    assert args[2] is parameter
    assert args[3] is torch.relu
    copied.pages[0] += 1
    copied.pages.append(x)
    copied.done["layer"] = True
    args[1].zero_()
    assert len(ledger.pages) == 1
    assert not ledger.pages[0].any()
    assert ledger.done == {"layer": False}
    assert torch.equal(x, torch.ones(3))


def test_what_cannot_be_copied_is_shared() -> None:
    class Handle:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __copy__(self) -> Handle:
            raise TypeError("there is one of these")

    handle, lock = Handle(), threading.Lock()
    assert copy_inputs([handle, lock, None, "text", torch.float32])[:2] == [handle, lock]


def test_bytes_of_nested_tensors() -> None:
    nested = ((torch.zeros(3), 5), {"a": [torch.zeros(2, 2, dtype=torch.bfloat16)], "b": None})
    assert tensor_bytes(nested) == 12 + 8


def test_a_linears_input_has_a_place_or_a_name() -> None:
    x = torch.zeros(1)
    assert linear_input((x,), {}) is linear_input((), {"input": x}) is x


def test_identity_of_tensors() -> None:
    x = torch.zeros(4, 4)
    assert tensor_identity(x) == tensor_identity(x.detach())
    assert tensor_identity(x) == tensor_identity(x.view(4, 4))
    assert tensor_identity(x) != tensor_identity(x.t())
    assert tensor_identity(x) != tensor_identity(x[1:])
    assert tensor_identity(x) != tensor_identity(x.view(torch.int32))
    before = tensor_identity(x)
    x.add_(1)
    assert tensor_identity(x) != before
    with torch.inference_mode():
        y = torch.zeros(3)
        assert tensor_identity(y) == tensor_identity(y)


def test_views_of_all_of_a_contiguous_tensor_are_the_same() -> None:
    x = torch.randn(2, 5, 8)
    assert tensor_identity(x) == tensor_identity(x.view(10, 8)) == tensor_identity(x.view(2, 5, 2, 4))
    assert tensor_identity(x[:, :, :4]) != tensor_identity(x[:, :, 4:])
    assert tensor_identity(x.clone()) != tensor_identity(x)
