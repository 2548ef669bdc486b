"""The script for a machine with a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run.sh")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_it_is_a_script() -> None:
    for script in (SCRIPT, SCRIPT.parents[2] / ".ci" / "cuda"):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the script itself")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(str(tmp_path / "device.json"))
    assert done.returncode == 1
    assert "torch sees no GPU: try --check" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive  # minutes: it builds everything
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the build of the CUDA kernels is NOT tested: no nvcc")
def test_what_it_builds_can_be_imported() -> None:
    done = run("--build", "80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "libawq_cuda.so" in done.stdout


@pytest.mark.exhaustive  # a minute
def test_all_its_lines_on_the_emulated_gpu(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    done = run("--check", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert not result["failed"]
    assert set(result["checks"].values()) == {"passed"}
    assert {key for row in result["models"] for key in row} >= {"call", "us", "int4_ms_a_token", "seconds", "kl"}
    benchmark = result["benchmark"]
    assert benchmark["problems"] == []
    assert {"bandwidth", "block_seconds_compiled", "block_seconds_reference"} <= set(benchmark)
    assert len(benchmark["quantizing"]) == 7
    for row in benchmark["linear"]:
        assert {"us", "share_of_bandwidth", "cublas_bf16_us", "cublas_over_ours", "basic_us"} <= set(row)
        if row["bits"] == 4:
            assert isinstance(row["int4pack_mm_us"], float)
            assert "marlin_us" in row
