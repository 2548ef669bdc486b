"""The functions that AutoAWQ calls, on our CUDA kernels (emulated)."""

from __future__ import annotations

from collections.abc import Iterator

import emulated_gpu
import pytest
import torch

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS, PackedLinear
from awq_ext.integrations import autoawq, autoawq_layers
from awq_ext.kernels import reference

K, N, GROUP = 128, 64, 32


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    autoawq._extension.cache_clear()  # other tests have one on the path
    with emulated_gpu.kernels():
        yield


def layer(layout: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer's tensors as AutoAWQ holds them, and the weight [N, K] that they stand for."""
    codes, scales, zeros = reference.quantize_weight(torch.randn(N, K), GROUP)
    packed = PackedLinear(reference.pack_int4(codes), scales, zeros, K, GROUP)
    return LAYOUTS[layout].pack(packed), reference.dequantize_weight(codes, scales, zeros, GROUP)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_linears(rows: int) -> None:
    x = torch.randn(rows, K).half()
    gemm, weight = layer("awq")
    y = awq_ext.gemm_forward_cuda(x, gemm["qweight"], gemm["scales"], gemm["qzeros"], 8)
    torch.testing.assert_close(y, (x.float() @ weight.T).half(), rtol=2e-3, atol=2e-2)
    gemv, weight = layer("gemv")
    tensors = gemv["qweight"], gemv["scales"], gemv["qzeros"]
    for y in (awq_ext.gemv_forward_cuda(x, *tensors, GROUP), awq_ext.gemmv2_forward_cuda(x, *tensors, GROUP, 8)):
        torch.testing.assert_close(y, (x.float() @ weight.T).half(), rtol=2e-3, atol=2e-2)


def test_the_weight() -> None:
    gemm, weight = layer("awq")
    ours = awq_ext.dequantize_weights_cuda(gemm["qweight"], gemm["scales"], gemm["qzeros"], 0, 0, 0, False)
    assert torch.equal(ours, weight.half().T)


def test_a_layer_is_converted_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm, _ = layer("awq")
    tensors = gemm["qweight"], gemm["scales"], gemm["qzeros"]
    calls = []
    unpack = LAYOUTS["awq"].unpack
    monkeypatch.setattr(type(LAYOUTS["awq"]), "unpack", lambda _, *args: calls.append(1) or unpack(*args))
    x = torch.randn(2, K).half()
    first = [awq_ext.gemm_forward_cuda(x, *tensors, 8) for _ in range(2)]
    assert len(calls) == 1
    assert torch.equal(*first)
    gemm["scales"].mul_(2)
    torch.testing.assert_close(awq_ext.gemm_forward_cuda(x, *tensors, 8), 2 * first[0], rtol=1e-3, atol=1e-3)
    assert len(calls) == 2
    held = len(autoawq_layers._made)
    del tensors
    gemm.clear()
    assert len(autoawq_layers._made) == held - 1


@pytest.mark.parametrize("name", autoawq.FUNCTIONS[4:])
def test_other_functions_are_missing(name: str) -> None:
    assert not hasattr(awq_ext, name)
