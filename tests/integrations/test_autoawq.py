"""What AutoAWQ finds when it looks for its CUDA extension; with AutoAWQ itself: tests/counterparts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import awq_ext
from awq_ext.integrations import autoawq


@pytest.fixture(autouse=True)
def forgetful() -> None:
    """Every test looks for the extension anew."""
    autoawq._extension.cache_clear()


@pytest.mark.parametrize("name", autoawq.FUNCTIONS)
def test_every_kernel_is_an_error_that_says_what_to_do(name: str) -> None:
    assert not hasattr(awq_ext, name)
    with pytest.raises(AttributeError, match=rf"awq_ext\.{name} .* awq_ext\.from_pretrained"):
        getattr(awq_ext, name)


def test_other_names_are_ordinary_errors() -> None:
    with pytest.raises(AttributeError, match="module 'awq_ext' has no attribute 'nothing'"):
        _ = awq_ext.nothing


EXTENSION = """
#include <Python.h>
static PyObject* gemm_forward_cuda(PyObject* self, PyObject* args) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"gemm_forward_cuda", gemm_forward_cuda, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "awq_ext", "", -1, methods};
PyMODINIT_FUNC PyInit_awq_ext(void) { return PyModule_Create(&definition); }
"""


def test_a_real_extension_of_that_name_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the extension's hiding NOT TESTED: no C compiler")
    source, suffix = tmp_path / "awq_ext.c", sysconfig.get_config_var("EXT_SUFFIX")
    source.write_text(EXTENSION)
    include = sysconfig.get_path("include")
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", tmp_path / f"awq_ext{suffix}"], check=True
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert awq_ext.gemm_forward_cuda(1, 2, 3) == 42
    assert sys.modules["awq_ext"] is awq_ext
    with pytest.raises(AttributeError):
        _ = awq_ext.layernorm_forward_cuda
