"""Who loads what: no program is named that refuses the model."""

from __future__ import annotations

from awq_ext.reporting.readers import lines, readers, zero_points_told


def test_programs_that_refuse_zero_points_are_not_named() -> None:
    """vLLM 0.32 takes "gptq" with "sym": true alone; Transformers takes both, but for either it needs two packages."""
    assert [reader.name for reader in readers("gptq")] == ["vLLM", "Transformers", "awq_ext"]
    assert [reader.name for reader in readers("gptq", zero_points=True)] == ["Transformers", "awq_ext"]
    for zero_points in (False, True):
        assert any(line.endswith("(pip install gptqmodel optimum)") for line in lines("gptq", "x", zero_points))
        assert lines("awq", "x", zero_points) == lines("awq", "x")
    assert zero_points_told({"sym": False})
    assert not any(map(zero_points_told, ({"sym": True}, {"sym": None}, {})))
