"""The command line: what it teaches, what it refuses, what it returns."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
from programs import run_python
from typer.testing import CliRunner

import awq_ext
from awq_ext import _C, cli
from awq_ext.cli.options.settings import parse_setting
from awq_ext.demo import run
from awq_ext.layers import quant_linear as qlinear

runner = CliRunner()


def test_help_teaches() -> None:
    shown = runner.invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    for word in ("demo", "doctor", "quantize(model, calib_loader)"):
        assert word in shown.output


@pytest.mark.parametrize("command", ["quantize", "compare", "eval", "report", "inspect", "bench", "demo", "doctor"])
def test_each_command_has_help(command: str) -> None:
    shown = runner.invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0 and len(shown.output) > 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--nonsense"],
        ["demo", "--tokens", "many"],
        ["demo", "--tokens", "10"],
        ["demo", "--group-size", "5"],
        ["demo", "--threads", "0"],
        ["demo", "--json", "/no such folder/figures.json"],
        ["doctor", "extra"],
        ["bench", "--shape", "4096"],
        ["bench", "--dtype", "int8"],
    ],
)
def test_a_bad_option_is_a_usage_error(arguments: list[str]) -> None:
    shown = runner.invoke(cli.app, arguments)
    assert shown.exit_code == 2


@pytest.mark.parametrize("more", [["quantize", ".", "out"], ["compare", ".", "--traffic", "text.txt"]])
def test_without_calibration_text_it_says_what_to_give(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = [str(tmp_path) if part == "." else part for part in more]
    shown = runner.invoke(cli.app, given, env={"COLUMNS": "200"})
    assert shown.exit_code == 2 and "Missing option '--calib'. Give a text file, or --calib builtin" in shown.output


def test_a_bad_group_size_names_the_choices() -> None:
    shown = runner.invoke(cli.app, ["demo", "--group-size", "5"], env={"COLUMNS": "200"})
    assert "-1, 16, 32, 64, 128, 256" in shown.output


def test_json_into_a_folder_is_refused(tmp_path) -> None:
    assert runner.invoke(cli.app, ["demo", "--json", str(tmp_path)]).exit_code == 2


def test_defaults_are_those_of_the_demo() -> None:
    parameters = inspect.signature(cli.demo.demo).parameters
    assert parameters["tokens"].default == run.TOKENS
    assert parameters["group_size"].default == run.GROUP_SIZE


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from awq_ext.demo import display

    class Result:
        def to_dict(self) -> dict[str, float]:
            return {"perplexity": 2.5, "unknown": float("nan")}

    def shown_result(*arguments: object) -> Result:
        seen.append(arguments[:2])
        return Result()

    seen: list[object] = []
    monkeypatch.setattr(display, "run_and_show", shown_result)
    threads = torch.get_num_threads()
    try:
        path = tmp_path / "f.json"
        options = ["--tokens", "512", "--group-size", "64", "--json", str(path), "--threads", "1"]
        shown = runner.invoke(cli.app, ["demo", *options])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert shown.exit_code == 0 and seen == [(512, 64)]
    assert json.loads(path.read_text()) == {"perplexity": 2.5, "unknown": None}
    piped = runner.invoke(cli.app, ["demo", "--json", "-"])
    assert json.loads(piped.stdout)["perplexity"] == 2.5 and not (Path.cwd() / "-").exists()


def test_demo_without_text_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_ext.demo import data, display

    def no_text(*_: object) -> None:
        raise data.NoSourceError("no Python source files under /nowhere")

    monkeypatch.setattr(display, "run_and_show", no_text)
    shown = runner.invoke(cli.app, ["demo"])
    assert shown.exit_code == 1
    assert "no Python source files under /nowhere" in shown.output and "Traceback" not in shown.output


def test_doctor(tmp_path: Path) -> None:
    shown = runner.invoke(cli.app, ["doctor", "--json", str(tmp_path / "doctor.json")])
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "doctor.json").read_text())
    facts, jobs = written["facts"], [(line["job"], line["kernel"], line["reason"]) for line in written["jobs"]]
    assert facts["awq_ext"] == awq_ext.__version__
    assert facts["torch_installed"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["kernels_in_use"].startswith(f"{_C.isa()}: ")
    assert "scalar" in facts["kernels_available"]
    assert facts["processor"] and facts["memory_read_at"].endswith(" GB/s")
    assert " GFLOP/s with 512 rows, " in facts["float_bf16_product"] and " GFLOP/s with" in facts["int4_product"]
    assert jobs == _C.choices()
    for name in (*(job for job, _, _ in jobs), "kernels in use", "memory read at"):
        assert name in shown.output


def test_doctor_says_what_each_job_uses_and_why() -> None:
    from awq_ext.cli import doctor

    fastest, reason = _C.default_isa()
    before = _C.isa()
    try:
        _C.set_isa(fastest)
        assert doctor.why_these_kernels() == reason
        assert {(job, f"{kernel}: {why}") for job, kernel, why in _C.choices()} <= set(doctor.facts())
        _C.set_isa("scalar")
        assert doctor.why_these_kernels() == f"asked for by AWQ_EXT_ISA; without it {fastest}: {reason}"
        why = "fp32 FMA: this level has no products of bf16"
        assert ("bf16 activations, 1 row or more", why) in doctor.facts()
        assert doctor.tile_facts() == ([], [])
    finally:
        _C.set_isa(before)


def test_doctor_reports_damaged_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_ext.cli import doctor

    monkeypatch.setattr(_C, "probe_tiles", lambda _: (50, 20, 0))
    assert doctor.tile_facts() == ([("AMX tiles", "20 of 50 holds interrupted, 0 damaged: safe to use")], [])
    monkeypatch.setattr(_C, "probe_tiles", lambda _: (50, 20, 3))
    (wrong,) = doctor.tile_facts()[1]
    assert "20 of 50 holds interrupted, 3 damaged" in wrong and "AWQ_EXT_ISA=avx512_vnni" in wrong


def test_doctor_finds_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One level of kernels that is off by a thousandth is named, and the level in use stays what it was."""
    right, before = qlinear.quant_linear, _C.isa()
    monkeypatch.setattr(qlinear, "quant_linear", lambda *a: right(*a) * (1.001 if _C.isa() == "scalar" else 1))
    shown = runner.invoke(cli.app, ["doctor"])
    assert shown.exit_code == 1
    assert "the scalar kernels are off by 0.001" in shown.output and shown.output.count("are off by") == 1
    assert _C.isa() == before


@pytest.mark.parametrize(
    ("few", "many", "said"),
    [(3.0, 1.0, "slower than bf16 here for 1 row (3.0 times as long)"), (0.5, 1.0, "")],
)
def test_doctor_says_where_int4_is_slower(few: float, many: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {1: {"float": 1e-3, "int4": few * 1e-3}, 512: {"float": 1e-2, "int4": many * 1e-2}}
    monkeypatch.setattr("awq_ext.evaluation.cost.layer_seconds", lambda *_: took)
    shown = runner.invoke(cli.app, ["doctor", "--json", "-"])
    figures, lines = json.loads(shown.stdout), " ".join(shown.stderr.split())
    assert said in figures["slower"] and bool(figures["slower"]) == bool(said)
    assert figures["slower"] in lines and ("slower than bf16" in lines) == bool(said)
    assert figures["facts"]["float_bf16_product"] == "859 GFLOP/s with 512 rows, 1,000 us for 1 row"


@pytest.mark.parametrize(("load", "shown"), [(2.5, False), (6.5, True)])
def test_doctor_tells_when_others_keep_the_cores_busy(
    load: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq_ext.cli import doctor

    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    words = f"load {load} on 4 cores: the speeds above are lower than this machine's"
    assert doctor.busy_words() == (words if shown else "")


def test_doctor_names_each_package_once() -> None:
    """The extra plot is a part of report."""
    shown = runner.invoke(cli.app, ["doctor"], env={"COLUMNS": "200"}).output
    assert shown.count("matplotlib") == 1 and "extra report" in shown and "extra plot" not in shown


def test_module_can_be_run() -> None:
    done = run_python("-m", "awq_ext", "--help")
    assert done.returncode == 0 and "demo" in done.stdout


def test_bench(tmp_path) -> None:
    options = ["--shape", "64x96", "--rows", "1", "--rows", "3", "--group-size", "32", "--seconds", "0.05"]
    shown = runner.invoke(cli.app, ["bench", *options, "--json", str(tmp_path / "b.json")])
    assert shown.exit_code == 0, shown.output
    layers = json.loads((tmp_path / "b.json").read_text())["layers"]
    assert [layer["rows"] for layer in layers] == [1, 3] and "64 x 96" in shown.output
    for layer in layers:
        assert layer["ratio"] == layer["seconds"]["float"] / layer["seconds"]["int4"] > 0
        assert layer["int8_ratio"] == layer["seconds"]["float"] / layer["seconds"]["int8"] > 0


@pytest.mark.parametrize(("int4", "said"), [(2.0, True), (0.5, False)])
def test_bench_says_what_to_do_where_int4_is_slower(int4: float, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"float": 1e-3, "int4": int4 * 1e-3, "int8": 0.5e-3}
    monkeypatch.setattr("awq_ext.evaluation.cost.race", lambda *_: took)
    options = ["--shape", "64x96", "--rows", "4", "--group-size", "32", "--json", "-"]
    shown = runner.invoke(cli.app, ["bench", *options])
    words, lines = json.loads(shown.stdout)["advice"], " ".join(shown.stderr.split())
    assert all(" ".join(line.split()) in lines for line in words)
    assert ('awq_ext.set_compute_dtype(model, "int8") makes it 2.0 times as fast' in lines) == said
    assert ("slower than the float Linear" in lines) == said == bool(words)


def test_doctor_as_json_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_ext.cli import doctor

    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "jinja2" else real(name))
    shown = runner.invoke(cli.app, ["doctor", "--json", "-"])
    figures = json.loads(shown.stdout)
    assert figures["extras"]["report"] == "missing jinja2: pip install 'awq-ext[report]'"
    assert figures["facts"]["memory_read_at"].endswith(" GB/s") and figures["problems"] == []


def test_help_is_broken_where_the_terminal_ends() -> None:
    """Docstrings have lines of their own, which would leave ragged ends in any other width."""
    shown = runner.invoke(cli.app, ["quantize", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    lines = [line.strip() for line in shown.output.splitlines()]
    (line,) = (line for line in lines if line.startswith("The calibration text decides"))
    assert line.endswith("awq-ext compare shows which method suits it best.")


@pytest.mark.parametrize("command", ["quantize", "compare", "eval", "report", "inspect", "convert", "bench"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: awq-ext {command} " in runner.invoke(cli.app, [command, "--help"]).output


def test_settings_are_json_or_words() -> None:
    texts = (
        "clip=false",
        "symmetric=True",
        "n_grid=4",
        "damping=0.5",
        "propagate=quantized",
        'only=["*.mlp.*"]',
        "a=b=c",
    )
    assert dict(map(parse_setting, texts)) == {
        "clip": False,
        "symmetric": True,
        "n_grid": 4,
        "damping": 0.5,
        "propagate": "quantized",
        "only": ["*.mlp.*"],
        "a": "b=c",
    }


def test_an_interrupt_is_one_line_and_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("awq_ext.demo.display.run_and_show", interrupted)
    shown = runner.invoke(cli.app, ["demo"])
    assert shown.exit_code == 130 and shown.stderr.startswith("interrupted") and "Traceback" not in shown.output


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: object) -> None:
        for number in range(3):
            warnings.warn(f"the layer [{number % 2}]\nis odd", UserWarning, stacklevel=number + 1)
        raise ValueError("no more")

    monkeypatch.setattr("awq_ext.demo.display.run_and_show", warned)
    before = warnings.showwarning
    for _ in range(2):  # a command later it may be said again
        shown = runner.invoke(cli.app, ["demo"])
        lines = ["warning: the layer [0] is odd", "warning: the layer [1] is odd", "error: no more"]
        assert shown.stderr.splitlines() == lines and shown.stdout == ""
    assert warnings.showwarning is before


def test_bugs_keep_their_traceback() -> None:
    from awq_ext.cli.console import one_line_errors

    with pytest.raises(KeyError):
        one_line_errors(lambda: {}["x"])()
