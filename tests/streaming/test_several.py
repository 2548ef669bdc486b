"""Several processes that quantize a checkpoint: the files of one process, also through the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_directory
import models
import pytest
import team
import torch

import awq_ext

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
SETTINGS: dict[str, Any] = {"group_size": 32, "n_grid": 2, "progress": False}
CALIB = "The quick brown fox jumps over the lazy dog, and 2 + 2 is 4. " * 60


def quantized(source: Path, target: Path, propagate: str) -> None:
    torch.manual_seed(0)
    batches = models.token_batches((12, 9, 12))
    awq_ext.quantize_checkpoint(source, target, batches, propagate=propagate, **SETTINGS)


def files(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "awq_report.json"}


@pytest.mark.parametrize("propagate", ["float", pytest.param("quantized", marks=pytest.mark.exhaustive)])
def test_a_streamed_checkpoint(propagate: str, tmp_path: Path) -> None:
    source = hf_directory.make(tmp_path / "float")
    quantized(source, tmp_path / "one", propagate)
    team.run(2, [__file__, str(source), str(tmp_path / "two"), propagate])
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["float", "one", "two"]


def test_the_command_through_torchrun(tmp_path: Path) -> None:
    source = hf_directory.make(tmp_path / "float")
    (tmp_path / "calib.txt").write_text(CALIB)
    options = ["--calib", "calib.txt", "--samples", "5", "--seq-len", "64", "--group-size", "32", "--set", "n_grid=2"]
    environment = team.environment()
    for start, out in (([], "one"), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "two")):
        words = [sys.executable, *start, "-m", "awq_ext", "quantize", source.name, out, *options]
        ended = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("planned peak memory") == 1  # only the first of them tells
        assert ended.stdout.count("next: awq-ext eval") == 1
    assert files(tmp_path / "two") == {
        name: text.replace(b"one", b"two") if name == "README.md" else text
        for name, text in files(tmp_path / "one").items()
    }
    assert sorted(one.name for one in tmp_path.iterdir()) == ["calib.txt", "float", "one", "two"]


def test_variables_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_ext.distributed.launch import launched

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not set: use torchrun"), launched():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="the variable WORLD_SIZE is 'two'"), launched():
        pass


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    quantized(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    torch.distributed.destroy_process_group()
