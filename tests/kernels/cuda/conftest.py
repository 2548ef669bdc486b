"""All tests of this folder run CUDA kernels on the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator

import emulated_gpu
import pytest

from awq_ext.kernels.cuda import library


@pytest.fixture(autouse=True)
def gpu() -> Iterator[library.Library]:
    """The emulated GPU, whose memory is that of the CPU."""
    with emulated_gpu.kernels() as loaded:
        yield loaded


@pytest.fixture(params=["ascending", "descending", "lowest", "highest"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All orders in which the threads of a block run."""
    monkeypatch.setenv("AWQ_EMULATED_ORDER", request.param)
    return request.param
