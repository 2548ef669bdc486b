"""Which torch a build takes: the installed one, hidden by pip or not, never another in its place."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from awq_ext import _abi

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "torch_requirement.py"
SETTINGS = {"others": ["numpy>=1.24"]}


@pytest.fixture
def requirement() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("torch_requirement", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hidden(requirement: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """As in pip's build environment: nothing of the packages here is on sys.path."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(requirement.importlib.util, "find_spec", lambda name: None)
    return requirement


def install(directory: Path, version: str) -> list[str]:
    """Write what finding a package needs: a module, and what pip knows of it."""
    (directory / "torch").mkdir(parents=True)
    (directory / "torch" / "__init__.py").write_text("raise AssertionError('the build imports torch')\n")
    facts = directory / f"torch-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return [str(directory)]


def test_the_torch_of_this_environment_is_found(requirement: types.ModuleType) -> None:
    import torch

    directory, version = requirement.found_torch()
    assert directory == Path(torch.__file__).parent
    assert version == _abi.public_version(torch.__version__)
    assert requirement.build_requirements() == []


def test_a_hidden_torch_is_found_and_required_as_it_is(
    hidden: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = install(tmp_path, "2.14.1+cu130")
    monkeypatch.setattr(hidden, "package_directories", lambda: directories)
    assert hidden.found_torch() == (tmp_path / "torch", "2.14.1")
    assert hidden.build_requirements() == []
    assert hidden.dynamic_metadata(SETTINGS, {}) == {"dependencies": ["torch==2.14.1", "numpy>=1.24"]}


def test_without_torch_the_pinned_one_is_asked_for(hidden: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "package_directories", list)
    assert hidden.found_torch() is None
    assert hidden.build_requirements() == [f"torch=={hidden.PINNED}"]
    assert hidden.dynamic_metadata(SETTINGS, {}) == {"dependencies": ["torch>=2.10", "numpy>=1.24"]}


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_an_old_torch_is_refused_and_not_replaced(hidden: types.ModuleType, tmp_path: Path, version: str) -> None:
    with pytest.raises(RuntimeError) as error:
        hidden.found_torch(install(tmp_path, version))
    text = str(error.value)
    assert version in text and str(tmp_path) in text
    assert 'pip install "torch>=2.10"' in text


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0.dev20261101+cpu", "3.0.0a0+git1234567"])
def test_newer_ones_are_taken(hidden: types.ModuleType, tmp_path: Path, version: str) -> None:
    assert hidden.found_torch(install(tmp_path, version)) == (tmp_path / "torch", version.partition("+")[0])


def test_the_torch_on_the_path_goes_first(
    requirement: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*install(tmp_path / "seen", "2.12.0"), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # whose spec would be taken for the path's
    assert requirement.found_torch(install(tmp_path / "hidden", "2.11.0")) == (tmp_path / "seen" / "torch", "2.12.0")


def test_a_package_directory_without_metadata_is_none(hidden: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()  # left by an uninstall
    assert hidden.found_torch([str(tmp_path)]) is None


HIDE = """import site, sys, sysconfig
hidden = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages()}
sys.path[:] = [entry for entry in sys.path if entry not in hidden]
"""


@pytest.mark.parametrize("hide", [False, True], ids=["seen", "hidden as pip hides"])
def test_what_cmake_reads(tmp_path: Path, hide: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE if hide else "")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment
        )

    assert (run("-c", "import torch").returncode != 0) == hide
    done = run(str(SCRIPT))
    assert done.returncode == 0, done.stderr
    directory, version = done.stdout.strip().split(";")
    assert (Path(directory) / "lib").is_dir()
    assert version == _abi.built_version()


def test_a_wheel_of_another_torch_says_so_at_import(tmp_path: Path) -> None:
    """The package as a wheel installs it, with what a build against another torch writes."""
    built = "2.10.7"
    package = tmp_path / "awq_ext"
    shutil.copytree(
        ROOT / "awq_ext", package, ignore=shutil.ignore_patterns("_C.*", "_build.py", "__pycache__", "*.safetensors")
    )
    (package / "_build.py").write_text(f'TORCH_VERSION = "{built}"\n')
    (package / "_C.py").write_text("raise AssertionError('loaded with the wrong torch')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import awq_ext"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: awq_ext was built against torch {built} but torch ")
    assert f"`pip install torch=={built}`" in last and f"`{_abi.REBUILD}`" in last
