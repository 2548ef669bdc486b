"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import models
import pytest
import torch

from awq_ext import _C
from awq_ext.kernels import reference

# The tiny models here spend longer waking a second thread than they compute; other cores are for other tests (pytest-xdist).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from one seed, with the default backend, and must leave torch's modes as it found them."""
    monkeypatch.delenv("AWQ_EXT_BACKEND", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture(params=list(models.MODELS))
def case(request: pytest.FixtureRequest) -> models.Case:
    """Each of the tiny models in turn."""
    return models.make(request.param)


@contextmanager
def _in_force(isa: str) -> Iterator[None]:
    before = _C.isa()
    _C.set_isa(isa)
    yield
    _C.set_isa(before)


def _levels() -> list[Any]:
    """All instruction sets; of the two that emulate tile registers, the slow one is tried with the exhaustive tests."""
    names = _C.available_isas()
    twice = "amx_emulated" in names
    return [pytest.param(n, marks=pytest.mark.exhaustive) if twice and n == "amx_plain" else n for n in names]


@pytest.fixture(params=_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn, in force during the test."""
    with _in_force(request.param):
        yield request.param


@pytest.fixture(params=["reference", *_levels()])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The reference, which knows no instruction sets, and the compiled kernels on each of them."""
    if request.param == "reference":
        yield reference
        return
    with _in_force(request.param):
        yield _C


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the compiled kernels, and with the reference."""
    monkeypatch.setenv("AWQ_EXT_BACKEND", request.param)
