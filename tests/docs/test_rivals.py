"""The benchmark against other tools: who counts as a rival, what its file holds, and what the tables say of several machines."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_rivals")


@pytest.fixture
def rival_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("rival_tables")


@pytest.mark.parametrize(
    ("name", "errors", "words"),
    [
        ("vllm", [0.0016, 0.0022], ""),
        ("ark", [1e-7, 1e-7], ""),
        ("vllm", [0.002, 0.3], "is 0.3, which is wrong"),
        ("openvino", [float("nan")], "wrong"),
        ("vllm_int8", [0.006, 0.009], ""),
        ("ark_int8", [4e-7, 4e-7], "does not round activations"),
        ("openvino_int8", [0.006, 0.05], "wrong"),
    ],
)
def test_an_error_out_of_its_class_is_told(bench: ModuleType, name: str, errors: list[float], words: str) -> None:
    found = bench.problem(name, errors)
    assert words in found and bool(found) == bool(words)


def test_ours_and_torchs_are_made_and_judged(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The contenders that need no other tool, and one that is absent or wrong."""
    case = bench.Case.random(256, 64, 64)
    inputs = [torch.randn(rows, 256).bfloat16() for rows in (1, 5)]

    def absent(_: Any) -> None:
        raise ImportError("nothing at /some/where/tool.py")

    def wrong(own: Any) -> Any:
        return lambda x: lambda: x.float() @ own.weight.T * 1.1

    every = bench.W4A16 | bench.W4A8
    makers = {name: every[name] for name in ("awq_ext", "bf16", "awq_ext_int8")} | {"vllm": absent, "openvino": wrong}
    if torch.cpu.get_capabilities().get("avx2"):
        makers["torch_int4"] = every["torch_int4"]  # elsewhere it has another layout
    running, errors, missing = bench.made(case, inputs, makers)
    assert set(running) == set(errors) == set(makers) - {"vllm", "openvino"}
    assert missing["vllm"] == "ImportError: nothing at ..." and "which is wrong" in missing["openvino"]
    assert capsys.readouterr().out.count("NOT MEASURED") == 2
    with pytest.raises(SystemExit, match=r"awq_ext: the relative error of its output is 0\.1"):
        bench.made(case, inputs, {"awq_ext": wrong})


def test_words_of_eight_codes(bench: ModuleType) -> None:
    contenders = importlib.import_module("contenders")
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    (plain,), (shuffled,) = (
        contenders.words(codes, order)[0].tolist() for order in (contenders.IN_TURN, contenders.AUTOAWQ)
    )
    assert plain & 0xFFFFFFFF == 0xF7654321
    assert shuffled & 0xFFFFFFFF == 0xF6427531


def figures(processor: str, kind: str, ours: float) -> dict[str, Any]:
    result = {
        **{"in": 64, "out": 96, "rows": 1, "group_size": 32},
        "times": {"awq_ext": ours, "awq_ext_int8": ours, "vllm": 3 * ours, "bf16": 2 * ours},
        "ratios": {"W4A16": {"vllm": 3.0, "bf16": 2.0}, "W4A8": {"bf16": 2.0}},
    }
    machine = {"processor": processor, "cores": 8, "isa": "avx2", "threads": 8, "torch": "2.13.0"}
    return {
        **{"processor": processor, "kind": kind, "machine": machine, "versions": {"torch": "2.13.0", "vllm": "0.32.0"}},
        "missing": {"ark": "ImportError: no ARK"},
        "errors": {"awq_ext": 0.001, "awq_ext_int8": 0.007, "vllm": 0.002, "bf16": 0.002},
        "results": [result],
    }


def test_figures_of_one_processor_leave_those_of_others(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rivals.json"
    for machine in (figures("One", "avx2", 1e-3), figures("Two", "avx2", 2e-3), figures("One", "avx2", 3e-3)):
        bench.write(path, machine)
    data = json.loads(path.read_text())
    assert list(data) == ["One, 8 threads", "Two, 8 threads"]
    assert [d["results"][0]["times"]["awq_ext"] for d in data.values()] == [3e-3, 2e-3]


def test_tables_of_two_machines(bench: ModuleType, rival_tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("tables")
    data = {"One": figures("One", "avx2", 1e-4), "Two": figures("Two", "amx_bf16", 5e-5)}
    text = rival_tables.all_machines(data, tables.markdown, tables.described)
    one, two = text.split("### Two")
    assert "Measured on: One, 8 cores" in one and "| 64 x 96 | 1 | 100 | 3.00x | **2.00x** |" in one
    assert "Two, 8 cores" in two and "| 64 x 96 | 1 | 50 | 3.00x | **2.00x** |" in two
    assert "vLLM 0.32.0" in one and "Not measured here: ARK. Reason: ImportError: no ARK." in one
    assert "OpenVINO" not in text
    none = text.rpartition("No figures yet of: ")[2]
    assert "AMX (Intel" not in none and "AVX2 only" not in none and "ARM and others" in none and "Zen 4" in none


def test_every_kind_and_name_has_words(bench: ModuleType, rival_tables: ModuleType) -> None:
    assert bench.kind_of_processor() in rival_tables.KINDS
    for kind, makers in bench.CLASSES.items():
        ours, rivals = rival_tables.CLASSES[kind]
        assert {ours, *rivals} - {"bf16"} == set(makers) - {"bf16"} and ours == bench.OURS[kind]
        assert set(rivals) <= set(rival_tables.NAMES)
