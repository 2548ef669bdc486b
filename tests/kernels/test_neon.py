"""The NEON kernels, on a machine that has none: neon_kernels.cpp is cross-compiled for aarch64 and run under an emulator.

It compares them with the scalar kernels and with sums in double, without torch. Needs Debian's g++-aarch64-linux-gnu and
qemu-user (or an aarch64 machine, where the native compiler is used and test_kernels.py covers them as well).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As in CMakeLists.txt.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
FLAGS = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fopenmp", f"-I{ROOT / 'csrc'}"]
SOURCES = {
    "csrc/kernels/scalar.cpp": KERNEL_FLAGS,
    "csrc/kernels/neon.cpp": KERNEL_FLAGS,
    "csrc/base/buffer.cpp": [],
    "csrc/base/helpers.cpp": [],
    "csrc/base/parallel.cpp": [],
    "csrc/drivers/activations.cpp": [],
    "csrc/drivers/choice.cpp": [],
    "csrc/drivers/linear.cpp": [],
    "csrc/drivers/tiles.cpp": [],
    "tests/neon_kernels.cpp": [],
}


def tools() -> tuple[str, list[str]]:
    """The compiler, and what a program starts with."""
    if platform.machine() == "aarch64":
        return shutil.which("g++") or pytest.skip("no g++"), []
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("the NEON kernels are NOT tested here: apt-get install g++-aarch64-linux-gnu qemu-user")
    return compiler, [emulator]


@pytest.mark.exhaustive  # a cross-compiler and an emulator
def test_neon_kernels(tmp_path: Path) -> None:
    compiler, start = tools()
    objects = [str(tmp_path / f"{Path(source).stem}.o") for source in SOURCES]
    builds = [
        subprocess.Popen([compiler, *FLAGS, *extra, "-c", str(ROOT / source), "-o", made], stderr=subprocess.PIPE)
        for (source, extra), made in zip(SOURCES.items(), objects, strict=True)
    ]
    errors = [build.communicate()[1].decode() for build in builds]
    assert [build.returncode for build in builds] == [0] * len(builds), "\n".join(errors)
    program = str(tmp_path / "neon_kernels")
    subprocess.run([compiler, "-fopenmp", "-static", *objects, "-o", program], check=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*start, program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.removesuffix(" checks\n")) > 10_000
