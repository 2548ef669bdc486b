"""Who may include whom in csrc: adapters -> drivers -> kernels -> base, tensors in adapters only.

The CUDA kernels stand aside: they include base and their own folder, and nothing includes them, but for adapters, which may know
their C interface. The toolkit's headers are named in cuda/gpu only, so that all else there compiles without it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LAYERS = ["adapters", "drivers", "kernels", "base"]  # from the top down
ASIDE, INTERFACE = "cuda", "cuda/awq_cuda.h"
TENSOR_HEADERS = ("torch", "ATen", "c10", "pybind11", "Python.h")
# In a level's file an inline function would be compiled for one processor and perhaps linked for all: no standard library.
LEVEL_HEADERS = {"immintrin.h", "arm_neon.h", "cstddef"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def is_level(path: Path) -> bool:
    """A file of one instruction set, or a body that is compiled into it."""
    compiled = path.suffix == ".cpp" and path.stem not in ("isa", "processor", "tile_check")
    return path.parent.name == "kernels" and (compiled or path.name.endswith("-inl.h"))


def fault(path: Path, layer: str, quoted: bool, name: str) -> str | None:
    """What is wrong with one include of the file ``path`` in ``layer``; None if nothing is."""
    first, *rest = name.split("/")
    if is_level(path):
        body = quoted and not rest and (name == "kernels.h" or name.endswith("-inl.h"))
        return (
            None
            if body or (not quoted and name in LEVEL_HEADERS)
            else "a level's file may include kernels.h, bodies and intrinsics only"
        )
    if layer == ASIDE:
        if not quoted:
            toolkit = (name.startswith("cuda_") or name == "cuda.h") and "gpu" not in path.parts
            return (
                "only adapters may see tensors" if first in TENSOR_HEADERS else "only cuda/gpu may" if toolkit else None
            )
        return None if first in (ASIDE, "base") and rest else "expected a path that begins with cuda or base"
    if not quoted:
        return "only adapters may see tensors" if layer != "adapters" and first in TENSOR_HEADERS else None
    if name == INTERFACE and layer == "adapters":
        return None
    if first not in LAYERS or not rest:
        return f"expected a path that begins with one of {', '.join(LAYERS)}"
    return None if LAYERS.index(first) >= LAYERS.index(layer) else f"{layer} may not include {first}"


def faults(csrc: Path) -> list[str]:
    """All wrong includes below a directory: file, include, reason."""
    found = []
    for path in sorted(path for suffix in ("h", "cpp", "cu") for path in csrc.rglob(f"*.{suffix}")):
        layer = path.relative_to(csrc).parts[0]
        if layer not in (*LAYERS, ASIDE):
            found.append(f"{path.relative_to(csrc)}: in none of {', '.join(LAYERS)}")
            continue
        for mark, name in INCLUDE.findall(path.read_text()):
            if reason := fault(path, layer, mark == '"', name):
                found.append(f"{path.relative_to(csrc)}: {name}: {reason}")
    return found


def test_includes_run_downwards() -> None:
    assert faults(CSRC) == []


def test_all_layers_are_there() -> None:
    assert {path.name for path in CSRC.iterdir()} == {*LAYERS, ASIDE}


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("drivers/a.cpp", '#include "adapters/checks.h"', "drivers may not include adapters"),
        ("base/a.h", '#include "kernels/kernels.h"', "base may not include kernels"),
        ("kernels/isa.h", '#  include "drivers/stats.h"', "kernels may not include drivers"),
        ("drivers/a.h", "#include <ATen/core/Tensor.h>", "only adapters may see tensors"),
        ("drivers/a.h", "#include <torch/library.h>", "only adapters may see tensors"),
        ("base/a.h", "#include <c10/util/Exception.h>", "only adapters may see tensors"),
        ("drivers/a.cpp", "#include <pybind11/pybind11.h>", "only adapters may see tensors"),
        ("drivers/a.cpp", '#include "a.h"', "expected a path"),
        ("drivers/a.cpp", '#include "../adapters/a.h"', "expected a path"),
        ("kernels/avx2.cpp", "#include <algorithm>", "a level's file"),
        ("kernels/avx2.cpp", '#include "base/layout.h"', "a level's file"),
        ("kernels/simd-inl.h", "#include <vector>", "a level's file"),
        ("other/a.cpp", "", "in none of"),
        ("drivers/a.cpp", '#include "cuda/awq_cuda.h"', "expected a path"),
        ("adapters/a.cpp", '#include "cuda/device.h"', "expected a path"),
        ("cuda/a.cu", '#include "kernels/kernels.h"', "expected a path that begins with cuda or base"),
        ("cuda/a.cu", "#include <ATen/ATen.h>", "only adapters may see tensors"),
        ("cuda/a.cu", "#include <cuda_fp16.h>", "only cuda/gpu may"),
        ("cuda/a.h", "#include <cuda.h>", "only cuda/gpu may"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, file: str, line: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(f"// A comment.\n{line}\n#include <cstdint>\n" if not is_level(path) else f"{line}\n")
    (found,) = faults(tmp_path)
    assert found.startswith(f"{file}: ")
    assert reason in found


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    for file, text in {
        "adapters/a.cpp": '#include <torch/library.h>\n#include "drivers/a.h"\n#include "cuda/awq_cuda.h"\n',
        "drivers/a.h": '#include <vector>\n#include "drivers/b.h"\n#include "kernels/kernels.h"\n',
        "kernels/avx2.cpp": '#include "kernels.h"\n#include <immintrin.h>\n#include "table-inl.h"\n',
        "kernels/isa.cpp": '#include "kernels/isa.h"\n#include <string>\n',
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert faults(tmp_path) == []
