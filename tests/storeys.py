"""The storeys of the package, from top to bottom, and the check that imports run downwards only.

A line may import from the lines below it; packages on one line are neighbours and leave each other alone.
``python tests/storeys.py`` writes what is drawn from here: the list in CONTRIBUTING.md and docs/storeys.svg.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "awq_ext"
LIST = re.compile(r"(?<=<!-- storeys -->\n\n).*?(?=\n\n<!-- end of storeys -->)", re.DOTALL)

STOREYS = (
    ("cli",),
    ("demo", "streaming"),
    ("evaluation", "integrations"),
    ("pipeline", "checkpoints"),
    ("solving", "tuning", "workdir", "distributed"),
    ("folding", "calibration"),
    ("survey",),
    ("standins",),
    ("forwards",),
    ("layers", "config"),
    ("kernels", "undo", "modules", "reporting"),
)
# What the package's own files beside the storeys are: the public names above all of them, and what they start with.
TOP = ("__init__", "__main__")
LEAVES = ("_C", "_abi", "_build")
# Packages of others, and the only places that may import them.
CONFINED = {
    "transformers": ("integrations", "checkpoints.conversions"),
    "peft": ("integrations.adapters",),
    "typer": ("cli",),
    "greenlet": ("forwards.lockstep",),
    "matplotlib": ("reporting.page",),
    "jinja2": ("reporting.page.render",),
}
_HEIGHT = {name: len(STOREYS) - i for i, names in enumerate(STOREYS) for name in names}


def module_name(root: Path, file: Path) -> str:
    """``folding/proof.py`` -> ``folding.proof``; a package's ``__init__`` goes by the package's name."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(root: Path, file: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that ``file`` imports, inside functions too; below the package without its name."""
    depth = file.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.removeprefix(f"{root.name}.")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = depth[: len(depth) - node.level + 1]
                stem = [*base, *(node.module or "").split(".")] if node.module else [*base]
            else:
                stem = (node.module or "").removeprefix(root.name).lstrip(".").split(".")
            yield from ((node.lineno, ".".join([*filter(None, stem), alias.name])) for alias in node.names)


def violations(root: Path) -> list[str]:
    """Every import in the package at ``root`` that runs upwards, to a neighbour, or to a package that it has no business with."""
    found = []
    for file in sorted(root.rglob("*.py")):
        name = module_name(root, file)
        top = name.partition(".")[0]
        for line, imported in imports(root, file):
            there = imported.partition(".")[0]
            where = f"{file.relative_to(root)}:{line} imports {imported}"
            if there in CONFINED and not any(f"{name}.".startswith(f"{place}.") for place in CONFINED[there]):
                found.append(f"{where}: only {', '.join(CONFINED[there])} may")
            if top in TOP or top in LEAVES or there == top or there not in _HEIGHT:
                continue
            if top not in _HEIGHT:
                found.append(f"{where}: {top} has no storey")
            elif _HEIGHT[there] >= _HEIGHT[top]:
                found.append(f"{where}: {there} is not below {top}")
    return found


def sentence(name: str) -> str:
    """What a package or module of the storeys is, from its own docstring: the first sentence, as Markdown."""
    file = PACKAGE / name / "__init__.py"
    text = ast.get_docstring(ast.parse((file if file.exists() else PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "`")


def listed() -> str:
    """The storeys as a Markdown list, from top to bottom; neighbours share a line of the contract, not of the list."""
    return "\n".join(f"- **{name}**: {sentence(name)}" for names in STOREYS for name in names)


def drawn() -> str:
    """The storeys as an SVG picture: a row for each line of the contract, neighbours side by side."""
    width, height, gap = 860, 44, 8
    size = {"width": str(width), "height": str(len(STOREYS) * (height + gap) + gap)}
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", **size)
    ElementTree.SubElement(svg, "rect", fill="white", **size)
    for row, names in enumerate(STOREYS):
        room = (width - gap) / len(names)
        for column, name in enumerate(names):
            x, y = gap + column * room, gap + row * (height + gap)
            place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{room - gap:g}", "height": f"{height}"}
            ElementTree.SubElement(svg, "rect", rx="5", fill="#e3edf5", stroke="#456", **place)
            middle = {"x": f"{x + (room - gap) / 2:g}", "text-anchor": "middle", "font-family": "sans-serif"}
            label = ElementTree.SubElement(svg, "text", y=f"{y + (19 if len(names) == 1 else 27):g}", **middle)
            label.set("font-weight", "bold")
            label.set("font-size", "14")
            label.text = name
            if len(names) == 1:
                note = ElementTree.SubElement(svg, "text", y=f"{y + 36:g}", fill="#345", **middle)
                note.set("font-size", "11")
                note.text = sentence(name).replace("`", "")
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(LIST.sub(lambda _: listed(), page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "storeys.svg").write_text(drawn(), encoding="utf-8")
