"""Which instruction set runs: default, environment variable, set_isa; and that every level's file compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import run_python

from awq_ext import _C

CSRC = Path(__file__).parents[2] / "csrc"


def run(isa: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", "import torch, awq_ext._C as c; print(c.isa())", AWQ_EXT_ISA=isa)


def test_default_is_one_that_is_fast_here() -> None:
    names = _C.available_isas()
    default, reason = _C.default_isa()
    assert names[0] == "scalar"
    assert default in names
    assert reason
    assert default not in ("amx_plain", "amx_emulated")
    if not os.environ.get("AWQ_EXT_ISA"):
        assert _C.isa() == default


def test_products_of_bf16_vectors_are_taken_where_they_are_fast() -> None:
    """Intel has the instruction since Cooper Lake, slower than fp32 FMA: csrc/kernels/isa.cpp."""
    names, (default, _), (vendor, _, _) = _C.available_isas(), _C.default_isa(), _C.processor()
    if "amx" in names:
        assert default == "amx"
    elif "avx512_bf16" in names:
        assert default == ("avx512_bf16" if vendor == "AuthenticAMD" else "avx512_vnni")
    else:
        assert default == next(name for name in reversed(names) if not name.startswith("amx_"))


WITH_VNNI = ("avx2", "avx512", "avx512_vnni")
WITH_BF16 = (*WITH_VNNI, "avx512_bf16")  # Intel's Cooper Lake, AMD since Zen 4
WITH_AMX = (*WITH_BF16, "amx")  # Intel since Sapphire Rapids


@pytest.mark.skipif(not hasattr(_C, "emulated_tiles_agree"), reason="levels of x86-64")
@pytest.mark.parametrize(
    ("vendor", "instructions", "tiles_agree", "expected"),
    [
        ("AuthenticAMD", WITH_BF16, False, "avx512_bf16"),
        ("AuthenticAMD", WITH_VNNI, False, "avx512_vnni"),
        ("GenuineIntel", WITH_BF16, False, "avx512_vnni"),
        ("GenuineIntel", WITH_AMX, True, "amx"),
        ("GenuineIntel", WITH_AMX, False, "avx512_vnni"),
        ("GenuineIntel", WITH_VNNI, True, "avx512_vnni"),  # no tiles, whatever a check of them would say
        ("GenuineIntel", ("avx2", "avx512"), False, "avx512"),
        ("GenuineIntel", ("avx2",), False, "avx2"),
        ("AuthenticAMD", ("avx2",), False, "avx2"),
        ("GenuineIntel", (), False, "scalar"),
    ],
)
def test_default_on_other_processors(
    vendor: str, instructions: tuple[str, ...], tiles_agree: bool, expected: str
) -> None:
    isa, reason = _C.default_isa_on(vendor, **dict.fromkeys(instructions, True), tiles_agree=tiles_agree)
    assert isa == expected
    assert reason


def test_this_processor_is_judged_like_one_that_is_made_up() -> None:
    names = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
    here = {name: name in _C.available_isas() for name in names}
    assert _C.default_isa() == _C.default_isa_on(_C.processor()[0], **here, tiles_agree=here["amx"])


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_environment_variable(isa: str) -> None:
    result = run(isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (isa or _C.default_isa()[0])


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_value_is_an_error_that_lists_the_choices(isa: str) -> None:
    result = run(isa)
    assert result.returncode == 1  # an exception, not a signal
    last = result.stderr.strip().splitlines()[-1]
    assert "AWQ_EXT_ISA" in last
    assert f"got '{isa}'" in last
    assert ", ".join(_C.available_isas()) in last


def test_set_isa() -> None:
    before = _C.isa()
    try:
        for name in _C.available_isas():
            _C.set_isa(name)
            assert _C.isa() == name
    finally:
        _C.set_isa(before)
    with pytest.raises(ValueError, match=r"expected one of scalar.*got 'sse9'"):
        _C.set_isa("sse9")
    assert _C.isa() == before


def test_neon_compiles(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu): NEON left uncompiled")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fopenmp-simd", "-c"]
    source, target = str(CSRC / "kernels" / "neon.cpp"), str(tmp_path / "neon.o")
    subprocess.run([compiler, *flags, source, "-o", target], check=True)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_levels_share_no_inline_function() -> None:
    """A weak symbol in a level's file could be the copy the linker keeps, with instructions older processors lack."""
    objects = sorted((CSRC.parent / "build").glob("**/awq_kernels.dir/**/*.cpp.o"))
    if not objects:
        pytest.skip("no object files of a build beside the source")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert not weak, f"{path.name}: {weak}"
