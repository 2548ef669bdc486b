"""Which product serves which number of rows, and why, level by level: ``_C.choices``, which ``awq-ext doctor`` prints."""

from __future__ import annotations

import pytest

from awq_ext import _C


def jobs(isa: str) -> list[tuple[str, str, str]]:
    if isa not in _C.available_isas():
        pytest.skip(f"this processor has no {isa}")
    before = _C.isa()
    try:
        _C.set_isa(isa)
        return _C.choices()
    finally:
        _C.set_isa(before)


def choices(isa: str) -> dict[str, str]:
    return {job: kernel for job, kernel, _ in jobs(isa)}


def reasons(isa: str) -> dict[str, str]:
    return {job: reason for job, _, reason in jobs(isa)}


@pytest.mark.parametrize("isa", _C.available_isas())
def test_every_job_has_one_short_reason(isa: str) -> None:
    found = jobs(isa)
    assert len({job for job, _, _ in found}) == len(found)
    assert all(0 < len(reason) <= 90 for _, _, reason in found)
    for _, kernel, reason in found:  # what is said to be missing is not used
        assert "no tiles" not in reason or "tiles" not in kernel
        assert "no products of bf16" not in reason or "bf16" not in kernel


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
    why = reasons(isa)
    few = "few rows: reading the weight takes longest, tiles would be slower"
    assert why["bf16 activations, 1 to 2 rows"] == why['compute_dtype="int8", 1 to 8 rows'] == few
    assert why["fp32 activations, 1 to 2 rows"] == f"{few} and bytes less exact"
    assert why["bf16 activations, 3 rows or more"] == "more rows: tiles take 16 at once"
    assert why["fp16 activations, 3 rows or more"] == "more rows: tiles take 16 at once, and 2 terms hold every bit"
    assert found["error feedback, 512 channels or more"] == "bf16 tiles, each factor in 2 terms"
    for job in ("error feedback, fewer channels", "factors of second moments"):
        assert found[job] == "bf16 tiles, each factor in 3 terms"
        assert why[job] == "the precision of fp32 is needed, and 3 terms have it"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_vnni", "neon"])
def test_levels_without_products_of_bf16_use_fp32(isa: str) -> None:
    found = choices(isa)
    assert found["bf16 activations, 1 row or more"] == "fp32 FMA"
    assert found["second moments, bf16"] == "fp32 FMA"
    why = reasons(isa)
    assert why["bf16 activations, 1 row or more"] == "this level has no products of bf16"
    assert why['compute_dtype="int8", 1 row or more'] == "asked for, and this level has no tiles"


def test_products_of_bf16_vectors() -> None:
    found = choices("avx512_bf16")
    assert found["bf16 activations, 1 row or more"] == "products of bf16 vectors"
    assert found["fp32 activations, 1 row or more"] == "fp32 FMA"
    assert found["ranking and fit of scales, clips"] == "products of bf16 vectors"
    why = reasons("avx512_bf16")
    assert why["bf16 activations, 1 row or more"] == "one instruction does twice the products of fp32 FMA"
    assert why["fp32 activations, 1 row or more"] == "bf16 or bytes would lose bits, and this level has no tiles"
    assert why["second moments, fp16"] == "bf16 would lose bits, and several terms are no faster"
