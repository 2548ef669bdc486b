"""AutoAWQ imports its CUDA extension as ``awq_ext``; with this package installed beside it, it keeps working."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from counterparts.counterpart import run

import awq_ext
import awq_ext._build


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder for the path of another Python with nothing but this package, compiled module and metadata included."""
    folder = tmp_path / "beside"
    folder.mkdir()
    package = folder / "awq_ext"
    package.mkdir()
    # of an editable installation the built modules lie elsewhere than the sources
    built = (Path(module.__file__) for module in (awq_ext._C, awq_ext._build))
    for path in (*Path(awq_ext.__file__).parent.iterdir(), *built):
        if not (package / path.name).exists() and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    installed = Path(str(metadata.distribution("awq-ext").locate_file("")))
    for information in installed.glob("awq_ext-*.dist-info"):
        (folder / information.name).symlink_to(information)
    return folder


@pytest.mark.parametrize("how", ["triton", "plain"])
def test_autoawq_computes_with_this_package_installed(how: str, beside: Path) -> None:
    assert "fuse_layers=False" in run("autoawq", "autoawq_beside_us.py", how, PYTHONPATH=str(beside))


def test_transformers_4_loads_through_this_package(beside: Path, tmp_path: Path) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    run("autoawq", "autoawq_write.py", folder, weights, "llama", "gemm", 64)
    output = run("autoawq", "transformers4_load.py", folder, weights, tmp_path / "again", PYTHONPATH=str(beside))
    assert "not serializable" in output
