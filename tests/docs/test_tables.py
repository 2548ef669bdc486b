"""The figures in the documents are those that the benchmarks wrote, and the tables say what the figures say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tests" / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_hold_the_tables_that_the_figures_make(tables: ModuleType) -> None:
    for document in tables.DOCUMENTS:
        text = (ROOT / document).read_text()
        assert tables.rendered(document) == text, f"{document}: run python tests/benchmarks/tables.py"
        assert tables.MARK.search(text)
    marked = {
        name for document in tables.DOCUMENTS for _, name, _ in tables.MARK.findall((ROOT / document).read_text())
    }
    assert marked == set(tables.TABLES)


def test_a_changed_figure_changes_the_documents(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    for path in (*(ROOT / "docs").glob("*.json"), *(ROOT / name for name in tables.DOCUMENTS)):
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    file = tmp_path / "docs" / "bench_linear.json"
    data = json.loads(file.read_text())
    data["results"][0]["ratios"]["bf16"] = 1234.5
    file.write_text(json.dumps(data))
    assert "1234.50x" in tables.rendered("docs/speed.md")


def test_figures_name_no_path() -> None:
    for path in (ROOT / "docs").glob("bench_*.json"):
        assert "/" not in path.read_text().replace('"/', ""), path


def test_what_several_machines_cost_is_what_the_rates_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import bench_scale

    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for table in bench_scale.tables(bench_scale.Rates.read(bench_scale.RATES), [1, 4, 16], 65536, 512).split("\n\n"):
        assert table in text, f"docs/scale.md: copy from python tests/benchmarks/bench_scale.py\n{table}"
