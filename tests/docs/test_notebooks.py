"""Every notebook runs from top to bottom in a fresh kernel, and shows what it is stored with; nothing of a machine is stored."""

from __future__ import annotations

import copy
import re
import struct
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INSTALL = "the notebooks were NOT tested: pip install 'awq-ext[test]'"
for needed in ("nbclient", "ipykernel", "matplotlib", "transformers", "peft"):
    pytest.importorskip(needed, reason=INSTALL)
nbformat = pytest.importorskip("nbformat", reason=INSTALL)
notebooks = pytest.importorskip("notebooks", reason=INSTALL)  # tests/notebooks.py

NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))
LARGEST = 400 * 1024  # bytes: GitHub shows larger ones late or not at all
WIDEST = 760  # pixels: wider images are shown smaller, and their letters with them

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebooks.code_cells(notebook) for output in cell.outputs]


def test_the_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_why_activations_matter",
        "02_quantize_a_model",
        "03_compare_on_your_traffic",
        "04_report_and_sensitivity",
        "05_lora_on_int4",
        "06_hugging_face_chat_and_serve",
    ]


@each_notebook
def test_stored_clean(path: Path) -> None:
    """Valid, with stable cell names, run from top to bottom, without warnings or traces of the machine it ran on."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "standard_library"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"} and set(cell.metadata.get("tags", [])) <= {notebooks.MACHINE_TAG}
        assert re.fullmatch(r"[a-z0-9-]+", cell.id) and not re.fullmatch(r"[0-9a-f]{8,}", cell.id)
    counts = [cell.execution_count for cell in notebooks.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert notebooks.refused(notebook) == []
    assert not notebooks.TRACES.search("".join(cell.source for cell in notebook.cells))
    assert path.stat().st_size <= LARGEST
    # a table that was printed instead of returned leaves an empty output behind
    assert all(output.data["text/plain"].strip() for output in outputs_of(notebook) if "data" in output)


@each_notebook
def test_stored_images_are_shown_as_they_are(path: Path) -> None:
    """PNG, which GitHub shows everywhere, and no wider than its page."""
    data = [output.data for output in outputs_of(read(path)) if any("image" in kind for kind in output.get("data", {}))]
    assert data
    for kinds in data:
        image = b64decode(kinds["image/png"])
        assert image.startswith(b"\x89PNG")
        assert 300 <= struct.unpack(">I", image[16:20])[0] <= WIDEST  # the width is the first field after the signature


# The others take half a minute to a minute each
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem.startswith("01") else pytest.mark.exhaustive)
        for path in NOTEBOOKS
    ],
)
def test_running_gives_what_is_stored(path: Path) -> None:
    """Within the tolerance that tests/notebooks.py states; ``python tests/notebooks.py --write`` stores them anew."""
    stored, fresh = read(path), notebooks.execute(path)
    assert notebooks.refused(fresh) == []
    assert notebooks.differences(stored, fresh) == []
    known, here = stored.metadata.standard_library, fresh.metadata["standard_library"]
    if known.sha256 != here["sha256"]:
        pytest.skip(f"figures NOT compared: they are of the source of Python {known.python}, here is {here['python']}")


def changed_figure(notebook: Any) -> None:
    """One figure in the first text that has a decimal, changed by a tenth."""
    output = next(o for o in outputs_of(notebook) if re.search(r"\d\.\d", o.get("text", "")))
    output.text = re.sub(r"\d+\.\d+", lambda found: f"{1.1 * float(found[0]) + 0.05:.4f}", output.text, count=1)


def changed_count(notebook: Any) -> None:
    whole = r"(?<![\d.,-])\d\d+(?![\d.,])"
    output = next(o for o in outputs_of(notebook) if re.search(whole, o.get("text", "")))
    output.text = re.sub(whole, lambda found: str(int(found[0]) + 1), output.text, count=1)


def changed_word(notebook: Any) -> None:
    output = next(o for o in outputs_of(notebook) if o.get("text", ""))
    output.text = output.text.replace(output.text.split()[0], "other", 1)


def removed_image(notebook: Any) -> None:
    cell = next(c for c in notebooks.code_cells(notebook) if any("image/png" in o.get("data", {}) for o in c.outputs))
    cell.outputs = [output for output in cell.outputs if "image/png" not in output.get("data", {})]


def removed_outputs(notebook: Any) -> None:
    notebooks.code_cells(notebook)[-1].outputs = []


@each_notebook
@pytest.mark.parametrize("change", [changed_figure, changed_count, changed_word, removed_image, removed_outputs])
def test_a_change_by_hand_is_found(path: Path, change: Callable[[Any], None]) -> None:
    stored = read(path)
    changed = copy.deepcopy(stored)
    change(changed)
    assert notebooks.differences(stored, stored) == []
    assert len(notebooks.differences(changed, stored)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("perplexity 2.5964 [2.41, 2.80]", "perplexity  2.5970 [2.42,  2.79]"),
        ("30 Linears in 3.2 s, peak memory 390.1 MiB", "30 Linears in 13.2 s, peak memory 411.7 MiB"),
        ("2.4e-05", "2.5e-05"),
        ("─────", "───────"),
    ],
)
def test_what_processors_make_of_a_figure_is_no_difference(one: str, other: str) -> None:
    assert notebooks.text_differences(one, other) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("perplexity 2.60", "perplexity 2.90"),
        ("-0.0245", "0.0245"),
        ("30 Linears in 3.2 s", "31 Linears in 3.2 s"),
        ("2.4e-05", "2.4e-04"),
        ("not significantly different", "a real difference"),
        ("1,316,160 parameters", "1,316,161 parameters"),
        ("one line", "one line\nanother"),
    ],
)
def test_other_figures_and_words_are_differences(one: str, other: str) -> None:
    assert len(notebooks.text_differences(one, other)) == 1
