"""Which product serves which number of rows, level by level: ``_C.choices``, which ``awq-ext doctor`` prints."""

from __future__ import annotations

import pytest

from awq_ext import _C


def choices(isa: str) -> dict[str, str]:
    if isa not in _C.available_isas():
        pytest.skip(f"this processor has no {isa}")
    before = _C.isa()
    try:
        _C.set_isa(isa)
        return dict(_C.choices())
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("isa", [name for name in _C.available_isas() if name.startswith("amx")])
def test_tiles_take_many_rows(isa: str) -> None:
    found = choices(isa)
    assert found["bf16 activations, 1 to 2 rows"] == "products of bytes, each activation in 3 terms"
    assert found["bf16 activations, 3 rows or more"] == "bf16 tiles"
    assert found["fp16 activations, 3 rows or more"] == "bf16 tiles, each activation in 2 terms"
    assert found["fp32 activations, 1 to 2 rows"] == "fp32 FMA"
    assert found["fp32 activations, 3 rows or more"] == "bf16 tiles, each activation in 3 terms"
    assert found['compute_dtype="int8", 1 to 8 rows'] == "products of bytes"
    assert found['compute_dtype="int8", 9 rows or more'] == "int8 tiles"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_vnni", "neon"])
def test_levels_without_products_of_bf16_use_fp32(isa: str) -> None:
    found = choices(isa)
    assert found["bf16 activations, 1 row or more"] == "fp32 FMA"
    assert found["second moments, bf16"] == "fp32 FMA"


def test_products_of_bf16_vectors() -> None:
    found = choices("avx512_bf16")
    assert found["bf16 activations, 1 row or more"] == "products of bf16 vectors"
    assert found["fp32 activations, 1 row or more"] == "fp32 FMA"
    assert found["ranking and fit of scales, clips"] == "products of bf16 vectors"
