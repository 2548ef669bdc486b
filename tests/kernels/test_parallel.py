"""Loops over several threads: parallel_loops.cpp, without torch and under the thread sanitizer; and kernels after a fork."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from programs import run_python

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["tests/parallel_loops.cpp", "csrc/base/parallel.cpp", "csrc/base/helpers.cpp"]
FLAGS = ["-O1", "-g", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fopenmp", f"-I{ROOT / 'csrc'}"]

AFTER_A_FORK = """
import os, signal
import torch
from awq_ext import _C
torch.set_num_threads(2)
weight, second_moment = torch.randn(256, 128), torch.eye(128)
expected = _C.scale_losses(weight, torch.ones(2, 128), second_moment, 32)
child = os.fork()
if child == 0:
    signal.alarm(60)
    same = expected.tolist() == _C.scale_losses(weight, torch.ones(2, 128), second_moment, 32).tolist()
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("which", ["all", "helpers"])
def test_loops(which: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("the loops are NOT tested by themselves here: no C++ compiler")
    # libgomp is not built for the sanitizer, which therefore sees races where there are none: only helpers run under it
    sanitizer = ["-fsanitize=thread"] if which == "helpers" else []
    program = str(tmp_path / "loops")
    sources = [str(ROOT / source) for source in SOURCES]
    subprocess.run([compiler, *FLAGS, *sanitizer, *sources, "-o", program], check=True)
    done = subprocess.run([program, which], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.removesuffix(" checks\n")) > 100_000


def test_a_forked_child_computes_on_as_many_threads() -> None:
    # with the OpenMP team alone it waits for threads that only the parent has
    done = run_python("-W", "ignore::DeprecationWarning", "-c", AFTER_A_FORK)
    assert done.returncode == 0, done.stderr
