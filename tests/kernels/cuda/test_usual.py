"""The usual Linear without Python (csrc/adapters/cuda_linear.h), on the emulated GPU: what it takes and what it leaves."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_gpu
import pytest
import torch
from linear_cases import NAMES, tiled
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import cuda
from awq_ext.kernels.cuda import library

N, K, GROUP = 40, 192, 64


def arguments(**changes: object) -> list[Any]:
    values = (torch.randn(3, K).half(), *tiled(N, K, GROUP, 4), None, None, K, N, GROUP, 4)
    return [*(dict(zip(NAMES, values, strict=True)) | changes).values()]


def off_by(tensor: Tensor, count: int) -> Tensor:
    """The same values, ``count`` elements behind where memory begins."""
    room = torch.empty(tensor.numel() + count, dtype=tensor.dtype)[count:].view(tensor.shape)
    return room.copy_(tensor)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_gives_what_python_gives(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_EXT_BACKEND", "compiled")
    sizes = (
        (N, K, GROUP),
        (33, 200, -1),
        (70, 40, 16),
        (40, 1160, 128),  # in parts of the channels
        (9, 104, 128),
    )
    for i, (n, k, group) in enumerate(sizes):
        for rows in ((1,), (2, 3), (40,)):
            x = torch.randn(*rows, k).to((torch.float16, torch.bfloat16)[i % 2])
            bias = (None, torch.randn(n), torch.randn(n).half())[i % 3]
            args = (
                x,
                *tiled(n, k, group, bits, (torch.float16, torch.bfloat16)[i // 2 % 2]),
                bias,
                None,
                k,
                n,
                group,
                bits,
            )
            ours = _C.usual_cuda_linear(*args, "auto")
            assert ours is not None
            assert ours.dtype == x.dtype
            assert torch.equal(ours, cuda.quant_linear(*args))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.randn(3, K)},
        {"x": torch.randn(3, K - 1).half()},
        {"x": torch.randn(0, K).half()},
        {"x": torch.randn(K, 3).half().T},
        {"x": off_by(torch.randn(3, K).half(), 1)},
        {"x": torch.randn(3, K, device="meta").half()},
        {"tiles": torch.zeros(2, 47, 64, dtype=torch.uint8)},
        {"tiles": torch.zeros(2, 48, 64, dtype=torch.int8)},
        {"scales": torch.zeros(2, 3, 32)},
        {"scales": torch.zeros(2, 4, 32).half()},
        {"zeros": torch.zeros(2, 3, 15, dtype=torch.uint8)},
        {"bias": torch.zeros(N + 1)},
        {"bias": torch.zeros(N).double()},
        {"bias": torch.zeros(2 * N)[::2]},
        {"pre_quant_scale": torch.ones(K)},
        {"bits": 8},
        {"group_size": 0},
        {"group_size": 63},
        {"out_features": 0},
        {"in_features": 196},
    ],
)
def test_what_is_unusual_is_left_to_python(changes: dict[str, object]) -> None:
    assert _C.usual_cuda_linear(*arguments(), "auto") is not None
    assert _C.usual_cuda_linear(*arguments(**changes), "auto") is None


def test_when_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments()
    assert _C.usual_cuda_linear(*args, "int8") is None
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")
    assert _C.usual_cuda_linear(*args, "auto") is None
    monkeypatch.delenv("AWQ_EXT_BACKEND")
    with monkeypatch.context() as bare:
        bare.setattr(library, "_substitute", [])
        with library.using(emulated_gpu.load()):
            assert _C.usual_cuda_linear(*args, "auto") is not None
        if not torch.cuda.is_available():  # the block is over, so no library is in use
            assert _C.usual_cuda_linear(*args, "auto") is None
    with library.using(emulated_gpu.load()):
        assert _C.usual_cuda_linear(*args, "auto") is not None


def instead_of(**functions: int) -> None:
    """Let C++ call the emulated library, but for these functions."""
    loaded = emulated_gpu.load()
    found = {name: loaded.address(name) for name in ("linear", "linear_parts", "error")}
    _C.use_cuda_library("cpu", **({"current_stream": 0} | found | functions))


def test_a_kernel_that_cannot_be_started() -> None:
    instead_of(linear=emulated_gpu.load().address("version"))  # whose result, 3, reads as an error
    words = "CUDA kernel 'linear' could not be started: .+AWQ_EXT_BACKEND=reference in the environment does without"
    with pytest.raises(RuntimeError, match=words):
        _C.usual_cuda_linear(*arguments(), "auto")


def test_a_library_that_cannot_be_called_is_not_left_in_use() -> None:
    class Missing(library.Library):
        def address(self, name: str) -> int:
            raise AttributeError(name)

    before = library.found()
    with pytest.raises(AttributeError), library.using(Missing(emulated_gpu.load().file, "cpu")):
        pass
    assert library.found() is before
    assert _C.usual_cuda_linear(*arguments(), "auto") is not None


def test_the_operator_of_a_gpu_takes_both_ways() -> None:
    """What a tensor on a GPU would run, on the CPU; the second way is registered for it here."""
    called = []

    def by_python(*args: Any) -> Tensor:
        called.append(args)
        return cuda.quant_linear(*args)

    fragment = torch.library.Library("awq_ext", "FRAGMENT")
    fragment.impl("quant_linear_by_python", by_python, "CPU")
    try:
        run = torch.ops.awq_ext.quant_linear.default.redispatch
        for changes, times in (({}, 0), ({"pre_quant_scale": torch.rand(K)}, 1), ({"bias": torch.randn(N)}, 1)):
            args = arguments(**changes)
            assert torch.equal(run(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args), cuda.quant_linear(*args))
            assert len(called) == times
        with pytest.raises(ValueError, match="'zeros': expected shape"):
            run(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments(zeros=torch.zeros(1, dtype=torch.uint8)))
    finally:
        fragment._destroy()


STREAMS = """
#include <cstdint>
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  static std::intptr_t calls = 0;
  *stream = reinterpret_cast<void*>(100 * device + calls++ * STEP);
  return RESULT;
}
"""


@pytest.mark.parametrize(("step", "result", "agrees"), [(7, 0, True), (8, 0, False), (7, 1, False)])
def test_the_stream_from_cpp_must_be_that_of_python(
    step: int, result: int, agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tmp_path / "streams.cpp", tmp_path / "streams.so"
    source.write_text(STREAMS)
    options = [f"-DSTEP={step}", f"-DRESULT={result}", "-shared", "-fPIC", "-o", str(made)]
    subprocess.run([emulated_gpu.compiler(), *options, str(source)], check=True)
    assert library.stream_function(made) == 0  # not loaded
    loaded = ctypes.CDLL(str(made))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=200))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=207))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    assert bool(library.stream_function(made)) == agrees
    assert library.stream_function(emulated_gpu.load().file) == 0
    if result:
        instead_of(
            current_stream=ctypes.cast(loaded.aoti_torch_get_current_cuda_stream, ctypes.c_void_p).value or 0,
        )
        with pytest.raises(RuntimeError, match="torch has no current CUDA stream"):
            _C.usual_cuda_linear(*arguments(), "auto")
