"""Every notebook runs from top to bottom in a fresh kernel of the running Python, and is stored without outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

INSTALL = "the notebooks were NOT tested: pip install 'awq-ext[test]'"
nbformat = pytest.importorskip("nbformat", reason=INSTALL)
nbclient = pytest.importorskip("nbclient", reason=INSTALL)
pytest.importorskip("ipykernel", reason=INSTALL)
pytest.importorskip("matplotlib", reason=INSTALL)

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Under a minute on two idle cores; the limit of one cell only ends a notebook that hangs
CELL_SECONDS = 600

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_why_activations_matter",
        "02_quantize_a_model",
        "03_compare_on_your_traffic",
        "04_report_and_sensitivity",
        "05_lora_on_int4",
    ]


@each_notebook
def test_stored_clean(path: Path) -> None:
    """Valid, with stable cell names, without outputs, run counts or traces of the machine it was written on."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    for cell in notebook.cells:
        assert not cell.metadata and not cell.get("outputs") and cell.get("execution_count") is None
        assert re.fullmatch(r"[a-z0-9-]+", cell.id) and not re.fullmatch(r"[0-9a-f]{8,}", cell.id)
    assert not re.search(r"/(home|tmp|root|work|Users)/", path.read_text(encoding="utf-8"))


# The others take half a minute each.
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem.startswith("02") else pytest.mark.exhaustive)
        for path in NOTEBOOKS
    ],
)
def test_runs(path: Path, tmp_path: Path) -> None:
    notebook = run(path, tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code_cells)
    assert not [output for output in outputs if output.output_type == "error"]
    # whoever reads a warning in a notebook thinks that something is wrong
    assert not [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    # a table that was printed instead of returned leaves an empty output behind
    assert all(output.data["text/plain"].strip() for output in outputs if "text/plain" in output.get("data", {}))
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    if path.stem.startswith(("01", "04", "05")):
        assert figures
    if path.stem.startswith("03"):
        assert [output for output in outputs if "<table>" in output.get("data", {}).get("text/html", "")]


def run(path: Path, tmp_path: Path) -> Any:
    """The executed notebook. Its kernel is this very Python, whatever kernels the user has installed."""
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    write_kernel_spec(tmp_path / "kernels" / "running-python")
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="running-python", kernel_spec_manager=specs)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, km=manager, timeout=CELL_SECONDS, resources=resources)
    # On a machine that does other work too, OpenMP threads that spin while they wait take the time of those that compute
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    # without cleanup_kc, nbclient leaves a kernel running whose manager it did not make
    client.execute(cleanup_kc=True, env=environment)
    return notebook
