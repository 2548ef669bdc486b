"""No kernel reads or writes behind its arguments; and the guard pages that show it do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated_gpu
from programs import run_python, seeing_tests


def run(*start: str) -> subprocess.CompletedProcess[str]:
    emulated_gpu.load()
    return run_python(*start, **seeing_tests())


def test_kernels_stay_within_their_arguments() -> None:
    done = run(str(Path(__file__).with_name("guarded.py")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 300


def test_a_read_behind_an_argument_is_fatal() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import guarded, torch, emulated_gpu\n"
        "with emulated_gpu.kernels():\n"
        "    short = torch.zeros(4096, dtype=torch.uint8)\n"
        "    guarded.guarded_run('pack', short, short, 1, 4098, torch.zeros(2049, dtype=torch.uint8))\n"
    )
    assert run("-c", code).returncode < 0
