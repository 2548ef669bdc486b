"""Run the notebooks, and store their outputs or compare the stored ones with what running gives.

Usage: python tests/notebooks.py [--write] [PART OF A NAME ...]

``--write`` stores the outputs; without it every difference is printed, and the exit status says whether there is any.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"
# A minute on two idle cores; the limit of one cell only ends a notebook that hangs
CELL_SECONDS = 600
# Cells with this tag in their metadata show what depends on the machine, such as timings: only the kinds of outputs are compared
MACHINE_TAG = "machine"
# What two processors may make of one decimal: RELATIVE of the larger, and LAST units of its last digit. The kernels of AVX2 and one
# thread, instead of AVX-512 and two, stay within that (AWQ_EXT_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
# OMP_NUM_THREADS=1).
RELATIVE, LAST = 0.03, 2
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
# Seconds and memory are the machine's, in whatever sentence they stand; so is the length of a rule above a column
MACHINE = re.compile(r"[\d.,]+ (?:s|GiB|MiB|KiB)\b|─+")
TRACES = re.compile(r"/(home|tmp|root|work|Users|usr|opt)/|0x[0-9a-f]{6,}")


def execute(path: Path) -> Any:
    """Run a notebook in a fresh kernel of this very Python, whatever kernels the user has installed."""
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "running-python")
        specs = KernelSpecManager(kernel_dirs=[f"{folder}/kernels"], ensure_native_kernel=False)
        manager = AsyncKernelManager(kernel_name="running-python", kernel_spec_manager=specs)
        resources = {"metadata": {"path": str(FOLDER)}}
        client = nbclient.NotebookClient(notebook, km=manager, timeout=CELL_SECONDS, resources=resources)
        # On a machine that does other work too, OpenMP threads that spin while they wait take the time of those that compute
        environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"} | os.environ
        # without cleanup_kc, nbclient leaves a kernel running whose manager it did not make
        client.execute(cleanup_kc=True, env=environment)
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Leave of an executed notebook what it shows: no times of cells, no memory addresses, one piece of text for each print."""
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        outputs: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["standard_library"] = standard_library()
    return notebook


def standard_library() -> dict[str, str]:
    """Name the text that the demo model reads: another Python has another standard library, and so other figures."""
    from awq_ext.demo.data import text

    digest = hashlib.sha256(text("calibration") + text("held-out")).hexdigest()[:16]
    return {"python": platform.python_version(), "sha256": digest}


def code_cells(notebook: Any) -> list[Any]:
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def differences(stored: Any, fresh: Any) -> list[str]:
    """Say where the stored outputs are not what running gave, a line each.

    The kinds of outputs (a text, a table, an image) must be the same everywhere. So must all words and whole numbers; decimals
    may differ by ``RELATIVE`` and ``LAST``. In cells with the tag ``machine``, and where the standard library is another, only
    the kinds are compared.
    """
    same_text = (
        stored.metadata.get("standard_library", {}).get("sha256") == fresh.metadata["standard_library"]["sha256"]
    )
    found = []
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        kinds = [[(o.output_type, sorted(o.get("data", {}))) for o in cell.outputs] for cell in (old, new)]
        if kinds[0] != kinds[1]:
            found.append(f"{old.id}: shows {kinds[0]}, running gives {kinds[1]}")
        elif same_text and MACHINE_TAG not in old.metadata.get("tags", []):
            for one, other in zip(texts(old), texts(new), strict=True):
                found += [f"{old.id}: {line}" for line in text_differences(one, other)]
    return found


def texts(cell: Any) -> Iterator[str]:
    """All texts and tables that a cell shows."""
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, text in sorted(output.get("data", {}).items()):
            if kind.startswith("text/"):
                yield text


def text_differences(stored: str, fresh: str) -> list[str]:
    """Compare two texts line by line, without regard to spaces."""
    lines = [MACHINE.sub("", text).splitlines() for text in (stored, fresh)]
    if len(lines[0]) != len(lines[1]):
        return [f"{len(lines[0])} lines stored, running gives {len(lines[1])}"]
    return [f"stored: {a.strip()!r}\n    now: {b.strip()!r}" for a, b in zip(*lines, strict=True) if not alike(a, b)]


def alike(one: str, other: str) -> bool:
    """Tell whether two lines have the same words and whole numbers, and decimals within the tolerance."""
    if NUMBER.sub("#", one).split() != NUMBER.sub("#", other).split():
        return False
    return all(close(a, b) for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True))


def close(one: str, other: str) -> bool:
    """Compare two numbers as they are printed."""
    if one == other:
        return True
    if not any("." in text or "e" in text for text in (one, other)):
        return False
    a, b = (float(text.replace(",", "")) for text in (one, other))
    return abs(a - b) <= RELATIVE * max(abs(a), abs(b)) + LAST * max(unit(one), unit(other))


def unit(text: str) -> float:
    """The worth of the last digit: 0.01 for 1.25, 1e-06 for 2.5e-05."""
    mantissa, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def refused(notebook: Any) -> list[str]:
    """Say which outputs must not be stored: errors, warnings and whatever else goes to stderr, and traces of the machine."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.get('text') or output.get('evalue')}")
            elif any(TRACES.search(text) for text in texts(cell)):
                found.append(f"{cell.id}: a path or an address of this machine")
    return found


def main(arguments: list[str]) -> int:
    """Write or compare the notebooks whose names hold one of the arguments, or all."""
    wanted = [name for name in arguments if name != "--write"]
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if not wanted or any(name in path.stem for name in wanted)]
    failed = not paths
    for path in paths:
        started, stored = time.perf_counter(), nbformat.read(path, as_version=4)
        fresh = execute(path)
        found = refused(fresh)
        if "--write" not in arguments:
            found += differences(stored, fresh)
        elif not found:
            nbformat.write(fresh, path)
        took, size = time.perf_counter() - started, path.stat().st_size / 1024
        print(
            f"{path.stem}: {took:.0f} s, {size:.0f} KiB, {'FAILED' if found else 'ok'}", *found, sep="\n  ", flush=True
        )
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
