"""AutoAWQ imports its CUDA extension as ``awq_ext``; with this package installed beside it, its users are told what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from counterparts.counterpart import our_package_alone, run


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    return our_package_alone(tmp_path / "beside")


@pytest.mark.parametrize("how", ["triton", "plain"])
def test_autoawq_says_what_to_do_with_this_package_installed(how: str, beside: Path) -> None:
    assert "awq_ext.from_pretrained" in run("autoawq", "autoawq_beside_us.py", how, PYTHONPATH=str(beside))


def test_transformers_4_loads_through_this_package(beside: Path, tmp_path: Path) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    run("autoawq", "autoawq_write.py", folder, weights, "llama", "gemm", 64)
    output = run("autoawq", "transformers4_load.py", folder, weights, tmp_path / "again", PYTHONPATH=str(beside))
    assert "this version of transformers cannot save quantized models: use awq_ext.save_pretrained" in output
