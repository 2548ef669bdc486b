"""The sentence that a torch of another release gets, and the state of the process beside torch."""

from __future__ import annotations

import sys

import pytest
import torch
from programs import run_python

from awq_ext import _abi


def test_the_installed_pair_fits() -> None:
    _abi.check()
    assert _abi.built_version() == _abi.public_version(torch.__version__)


def test_builds_of_one_release_are_interchangeable() -> None:
    _abi.check("2.13.0", "2.13.0+cu130", installed=True)


def test_another_release_is_refused_with_the_way_out() -> None:
    with pytest.raises(ImportError) as error:
        _abi.check("2.13.0", "2.14.1+cpu", installed=True)
    text = str(error.value)
    assert "built against torch 2.13.0 but torch 2.14.1+cpu is installed" in text
    assert "pip install torch==2.13.0" in text
    assert f"`{_abi.REBUILD}`" in text
    assert "\n" not in text


def test_a_bare_source_tree_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_abi, "built_version", lambda: None)
    with pytest.raises(ImportError, match=r"source tree.*pip install -e \."):
        _abi.check()


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ImportError, match="has not been built"):
        _abi.check("2.13.0", "2.13.0", installed=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    # in a process of its own: packages that other tests import may bring a runtime with them
    done = run_python("-c", "import torch, awq_ext._C; print(open('/proc/self/maps').read())")
    assert done.returncode == 0, done.stderr
    found = {line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line}
    assert len(found) == 1, f"two OpenMP runtimes in one process: {found}"
