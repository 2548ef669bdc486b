"""Bytes of a model: of what is packed, and of what would be."""

from __future__ import annotations

import models
import pytest
import torch

import awq_ext
from awq_ext.layers.quant_linear import QuantLinear
from awq_ext.layers.sizes import model_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float_model_takes_its_tensors(dtype: str) -> None:
    model = models.make("tied", getattr(torch, dtype)).model
    held = sum(p.nbytes for p in model.parameters())  # tied ones once
    assert model_bytes(model) == held
    assert model_bytes(model, 2) == held * 2 // next(model.parameters()).element_size()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layers_count_what_they_hold_and_the_rest_stays(bits: int) -> None:
    case = models.make("llama")
    before = model_bytes(case.model)
    linears = 3 * (3 * models.HIDDEN * models.INNER + models.HIDDEN * (2 * models.HIDDEN + 2 * 20)) * 4
    awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=2, progress=False, bits=bits)
    packed = sum(m.nbytes for m in case.model.modules() if isinstance(m, QuantLinear))
    assert model_bytes(case.model) == before - linears + packed


@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (8, 32), (4, -1)])
def test_fake_quantized_layers_count_as_if_packed(bits: int, group_size: int) -> None:
    case = models.make("mlp")
    settings = {"bits": bits, "group_size": group_size, "packed": False, "method": "rtn"}
    awq_ext.quantize(case.model, case.batches, progress=False, **settings)
    sizes = 0
    for k, n in [(24, models.INNER), (models.INNER, 24)]:
        groups = 1 if group_size == -1 else -(-k // group_size)
        sizes += 3 * (-(-n * (k * bits + groups * (24 if bits == 8 else 20)) // 8) + 4 * n)  # and its bias in fp32
    assert model_bytes(case.model) == sizes
