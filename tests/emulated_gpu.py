"""The CUDA kernels compiled for this processor: csrc/cuda/*.cu with csrc/cuda/host, where the threads of a block are fibers.

with emulated_gpu.kernels(): awq_ext.kernels.cuda.quant_linear(...)   # takes tensors on the CPU
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from awq_ext.kernels.cuda import library

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# What a GPU would not forgive stops the program: loads at odd addresses, shifts and sums that overflow.
FLAGS = [
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
    *("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}"),
]


HOST = sorted((CSRC / "cuda" / "host").glob("*.cpp"))  # what stands for a GPU
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))


def _cache(sources: tuple[Path, ...]) -> Path:
    """A folder of this user's, named after what is compiled: of many processes of one run the first compiles."""
    headers = sorted([*(CSRC / "cuda").rglob("*.h"), CSRC / "base" / "layout.h"])
    text = b"".join(file.read_bytes() for file in [*sources, *headers]) + " ".join(FLAGS).encode()
    folder = Path(tempfile.gettempdir()) / f"awq_ext-emulated-{os.getuid()}" / hashlib.sha256(text).hexdigest()[:16]
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)
    assert folder.parent.stat().st_uid == os.getuid(), f"{folder.parent} belongs to somebody else"
    return folder


def _compile(compiler: str, sources: tuple[Path, ...], folder: Path, to: Path) -> None:
    objects = [folder / f"{source.stem}.o" for source in sources]
    compiles = [
        [compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    for command in compiles:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    made = folder / "new.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(made)], check=True)
    made.replace(to)


def compiler() -> str:
    """The C++ compiler. Skips the test where there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("the CUDA kernels are NOT tested: no C++ compiler")
    return found


@functools.cache
def compiled(*kernels: Path) -> Path:
    """Compile files of kernels, and the GPU that they run on, to a library, unless another process has."""
    sources = (*kernels, *HOST)
    folder = _cache(sources)
    made = folder / "libawq_emulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _compile(compiler(), sources, folder, made)
    return made


@functools.cache
def load() -> library.Library:
    """Compile the library of all kernels and load it."""
    return library.Library(compiled(*KERNELS), "cpu")


@contextmanager
def kernels() -> Iterator[library.Library]:
    """Inside the block ``awq_ext.kernels.cuda`` runs on the emulated GPU, for tensors on the CPU."""
    loaded = load()
    with library.using(loaded):
        yield loaded
