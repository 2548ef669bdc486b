"""Which kernels run where, and a whole model quantized on the emulated GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import emulated_gpu
import models
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import awq_ext
from awq_ext import _C, kernels
from awq_ext.kernels import cuda, reference
from awq_ext.kernels.cuda import library
from awq_ext.layers import ops

CALL = re.compile(r"\brun\(\s*\"(\w+)\"")  # of a kernel, in awq_ext/kernels/cuda


def test_every_function_of_the_reference_is_there() -> None:
    dispatched = [name for name in vars(kernels) if callable(getattr(kernels, name)) and hasattr(_C, name)]
    assert len(dispatched) >= 13
    for name in (*dispatched, "ActivationStats"):
        assert callable(getattr(cuda, name)), name
        assert hasattr(reference, name)


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.kernels_for("cpu") is _C
    assert kernels.kernels_for("cuda") is cuda  # the emulated library is in force here
    assert kernels.kernels_for("meta") is reference
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")
    assert kernels.kernels_for("cuda") is reference
    monkeypatch.delenv("AWQ_EXT_BACKEND")
    with monkeypatch.context() as bare:
        bare.setattr(library, "_substitute", [])
        if not torch.cuda.is_available():
            assert kernels.kernels_for("cuda") is reference
            assert library.state().startswith("not ")


@pytest.mark.parametrize("name", ["quant_linear", "quant_weight"])
def test_operators_have_a_cuda_kernel(name: str) -> None:
    for key in ("CUDA", *(["AutocastCUDA"] if name == "quant_linear" else [])):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"awq_ext::{name}", key)


def test_what_cuda_tensors_would_run_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_for", lambda device: cuda)
    monkeypatch.setattr(ops, "kernels_for", lambda device: cuda)
    layer = awq_ext.QuantLinear(24, 12, 8)
    calls = []
    monkeypatch.setattr(cuda, "quant_linear", lambda *args: calls.append(args) or reference.quant_linear(*args))
    sizes = (layer.tiles, layer.tile_scales, layer.tile_zeros, None, None, 24, 12, 8, 4)
    y = ops._on_gpu("quant_linear")(torch.randn(2, 24), *sizes, "auto")
    assert y.shape == (2, 12)
    assert len(calls) == 1


def test_fake_tensors_on_a_gpu() -> None:
    # autograd asks for a stream, which aborts a torch without CUDA
    with FakeTensorMode(), torch.no_grad():
        layer = awq_ext.QuantLinear(24, 12, 8, device="cuda")
        x = torch.randn(3, 24, device="cuda", dtype=torch.bfloat16)
        assert (layer(x).shape, layer(x).dtype, layer(x).device.type) == ((3, 12), torch.bfloat16, "cuda")


def test_autocast_on_a_gpu_casts_as_a_linear_does() -> None:
    with FakeTensorMode(), torch.no_grad():
        layer, x = awq_ext.QuantLinear(24, 12, 8, device="cuda"), torch.randn(3, 24, device="cuda")
        weight = torch.randn(12, 24, device="cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would refuse: there is no GPU
        try:
            for dtype in (torch.float16, torch.bfloat16):
                torch.set_autocast_dtype("cuda", dtype)
                assert layer(x).dtype == torch.nn.functional.linear(x, weight).dtype == dtype
        finally:
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.set_autocast_enabled("cuda", False)
        assert layer(x).dtype == torch.float32


def test_a_layer_keeps_its_bytes_when_it_moves() -> None:
    """The compute layout is one for all devices: nothing is converted."""
    layer = awq_ext.QuantLinear(24, 12, 8)
    layer.qweight = torch.randint(0, 256, (12, 12), dtype=torch.uint8)
    moved = {name: buffer.to("meta") for name, buffer in layer.named_buffers()}
    assert {name: (b.shape, b.dtype) for name, b in moved.items()} == {
        name: (b.shape, b.dtype) for name, b in layer.to("meta").named_buffers()
    }


@pytest.mark.parametrize(
    ("model", "method"), [("mlp", "awq"), pytest.param("llama", "awq+gptq", marks=pytest.mark.exhaustive)]
)
def test_a_model_is_quantized(model: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that quantizing asks of kernels, end to end: losses are those of the reference."""
    losses = {}
    for name, module in (("reference", reference), ("cuda", cuda)):
        monkeypatch.setattr(kernels, "kernels_for", lambda device, module=module: module)
        torch.manual_seed(0)
        case = models.make(model)
        awq_ext.quantize(case.model, case.batches, method=method, group_size=16, n_grid=4)
        losses[name] = sum(layer.loss or 0.0 for layer in case.model.awq_report.layers)
    assert losses["reference"] > 0
    assert losses["cuda"] == pytest.approx(losses["reference"], rel=0.02)


def test_a_failed_launch_says_what_to_do(gpu: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(awq_cuda_tile=lambda *_: 7, awq_cuda_error=gpu._functions.awq_cuda_error)
    functions.awq_cuda_tile.argtypes = []
    monkeypatch.setattr(gpu, "_functions", functions)
    with pytest.raises(RuntimeError, match=r"'tile' could not be started: an error .*AWQ_EXT_BACKEND=reference"):
        cuda.tile_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, -1, 4)


def test_a_library_that_is_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        library.Library(tmp_path / "missing.so")
    monkeypatch.setattr(library, "VERSION", 99)
    with pytest.raises(OSError, match="is of version 3, this package calls version 99: build it again"):
        library.Library(Path(emulated_gpu.load().file))
    with monkeypatch.context() as bare:
        bare.setattr(library, "_substitute", [])
        with pytest.raises(RuntimeError, match="cannot run on cpu: "):
            cuda.pack_int4(torch.zeros(1, 2, dtype=torch.uint8))


def test_a_library_that_cannot_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is older than the runtime in the library: the reference works on."""
    loaded = emulated_gpu.load()
    assert loaded.problem() == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(library, "FILE", loaded.file)
    monkeypatch.setattr(library, "_stream", lambda: 1)
    assert library._look.__wrapped__()[1] == "in use, torch's CUDA 13.0"
    monkeypatch.setattr(library, "_stream", lambda: 0)
    assert library._look.__wrapped__()[1] == "in use, torch's CUDA 13.0, each call through Python"
    with monkeypatch.context() as asked:
        asked.setattr(library, "_look", lambda: (loaded, "in use"))
        assert library.state() == "in use, many rows by wgmma"
        asked.setenv("AWQ_EXT_CUDA_WGMMA", "0")
        assert library.state() == "in use"
    monkeypatch.setattr(library.Library, "problem", lambda self: "the driver is too old")
    assert library._look.__wrapped__() == (None, "not usable: the driver is too old")
    monkeypatch.setattr(library, "FILE", loaded.file.parent / "missing.so")
    assert library._look.__wrapped__()[1].startswith("not built: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(library, "FILE", loaded.file)
    assert library._look.__wrapped__() == (None, "not used: torch sees no GPU")


def test_python_calls_functions_with_as_many_arguments_as_they_have(gpu: library.Library) -> None:
    """ctypes cannot know: it is told by the first call of each, which all are here."""
    header = (emulated_gpu.CSRC / "cuda" / "awq_cuda.h").read_text()
    declared = {name: arguments.count(",") + 1 for name, arguments in re.findall(r"awq_cuda_(\w+)\(([^)]*)\);", header)}
    called = {name for file in Path(cuda.__file__).parent.glob("*.py") for name in CALL.findall(file.read_text())}
    assert called | {"version", "error", "usable", "chunks", "wgmma", "few", "linear_parts"} == set(declared)
    weight, moment, order = torch.randn(3, 12), torch.eye(12), torch.arange(12)
    codes, scales, zeros = cuda.quantize_weight(weight, 4)
    cuda.gptq_quantize(weight, moment, order, 4)
    cuda.refine_quantized(weight, codes, scales, zeros, moment, 4)
    cuda.search_clip(weight, moment, torch.ones(1), 4)
    cuda.code_losses(weight, codes, scales, zeros, moment, 4)
    cuda.ActivationStats(12).update(weight)
    tiles = cuda.tile_codes(cuda.pack_int4(cuda.unpack_int4(cuda.pack_int4(codes), 12)), 12, 4, 4)
    cuda.untile_codes(tiles, 3, 12, 4, 4)
    parts = tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, 4)
    for x in (weight, weight.half(), torch.randn(40, 12)):
        cuda.quant_linear(x, *parts, None, None, 12, 3, 4, 4)
    for name in called:
        assert len(getattr(gpu._functions, f"awq_cuda_{name}").argtypes) == declared[name], name
