"""The processor's name, from Linux's list or without it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from awq_ext.evaluation.processor import this_processor

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8480+
stepping\t: 8
flags\t\t: fpu amx_bf16

processor\t: 1
model\t\t: 999
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, "Intel(R) Xeon(R) Platinum 8480+ (GenuineIntel, family 6, model 143)"),
        (ARM, "Neoverse (implementer 0x41, part 0xd4f)"),
        (None, "Neoverse"),
    ],
)
def test_names(text: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "Neoverse")
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert str(this_processor(path)) == expected


def test_there_is_always_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert str(this_processor(tmp_path / "none")) == platform.machine()
