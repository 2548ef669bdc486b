"""What AutoAWQ finds when it looks for its CUDA extension; with AutoAWQ itself: tests/counterparts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS, PackedLinear
from awq_ext.checkpoints.formats.packed import pack_rows
from awq_ext.integrations import autoawq

OUT, IN, GROUP = 24, 128, 32


def packed() -> PackedLinear:
    codes = torch.randint(16, (OUT, IN), dtype=torch.uint8)
    zeros = torch.randint(16, (OUT, IN // GROUP), dtype=torch.uint8)
    return PackedLinear(pack_rows(codes), torch.rand(OUT, IN // GROUP).half(), zeros, IN, GROUP)


@pytest.fixture(autouse=True)
def forgetful() -> None:
    """Every test looks for the extension, and warns, anew."""
    autoawq._extension.cache_clear()
    autoawq._say.cache_clear()


def test_gemm_layers_are_computed() -> None:
    layer = packed()
    tensors = LAYOUTS["awq"].pack(layer)
    arguments = (tensors["qweight"], tensors["scales"], tensors["qzeros"])
    weight = layer.dequantize().half()
    with pytest.warns(UserWarning, match=r"awq_ext\.from_pretrained"):
        assert torch.equal(awq_ext.dequantize_weights_cuda(*arguments, 0, 0, 0, False), weight.T)
    x = torch.randn(3, IN).half()
    assert torch.equal(awq_ext.gemm_forward_cuda(x, *arguments, 8), x @ weight.T)


def test_gemv_layers_are_computed() -> None:
    layer = packed()
    tensors = LAYOUTS["gemv"].pack(layer)
    arguments = (tensors["qweight"], tensors["scales"], tensors["qzeros"], GROUP)
    x = torch.randn(3, IN).half()
    with pytest.warns(UserWarning, match="dequantizes"):
        assert torch.equal(awq_ext.gemv_forward_cuda(x, *arguments), x @ layer.dequantize().half().T)
    assert torch.equal(awq_ext.gemmv2_forward_cuda(x, *arguments, 8), x @ layer.dequantize().half().T)


@pytest.mark.parametrize("name", autoawq.FUSED_FUNCTIONS)
def test_functions_of_fused_modules_are_explained(name: str) -> None:
    assert not hasattr(awq_ext, name)
    with pytest.raises(AttributeError, match=rf"awq_ext\.{name} .* fuse_layers=False"):
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
