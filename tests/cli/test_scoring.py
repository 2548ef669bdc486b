"""Figures of a quantized model reach its card and its report: by quantize --traffic, and by eval --card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import hf_directory
import pytest
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and texts."""
    folder = tmp_path_factory.mktemp("made")
    hf_directory.make(folder / "float")
    for name in ("calib", "code"):
        (folder / f"{name}.txt").write_text(f"{name}: some text of this kind, again and again. " * 40)
    (folder / "rows.jsonl").write_text(json.dumps({"body": "a row of another kind. " * 40}))
    return folder


def quantize(made: Path, out: Path, *more: object) -> Any:
    options = ["--calib", made / "calib.txt", "--samples", 2, "--seq-len", 64, "--group-size", 32, "--method", "rtn"]
    return run("quantize", made / "float", out, *options, "--tokens", 256, *more)


def test_quantize_scores_what_it_made(made: Path, tmp_path: Path) -> None:
    traffic = ["--traffic", made / "code.txt", "--traffic", f"talk={made / 'rows.jsonl'}", "--field", "body"]
    page = tmp_path / "r.html"
    shown = quantize(
        made, tmp_path / "int4", *traffic, "--json", tmp_path / "q.json", "--report", page, "--token", "hf_se"
    )
    assert shown.exit_code == 0, shown.output
    card = (tmp_path / "int4" / "README.md").read_text()
    report = awq_ext.from_pretrained(tmp_path / "int4").awq_report
    assert json.loads((tmp_path / "q.json").read_text())["report"]["evaluations"] == report.evaluations
    scored = run(
        "eval", tmp_path / "int4", made / "code.txt", f"talk={made / 'rows.jsonl'}", "--reference", made / "float",
        "--seq-len", 64, "--tokens", 256, "--field", "body", "--json", "-",
    )  # fmt: skip
    figures = json.loads(scored.stdout)
    for name in ("code", "talk"):
        measured, again = report.evaluations[name], figures[name]
        assert {**measured, "seconds": 0} == {**again, "seconds": 0} and measured["kl"]["value"] > 0
        assert f"| scores on {name} | KL divergence {measured['kl']['value']:.4g} (" in card
    assert "not measured" not in card
    told = page.read_text(encoding="utf-8")  # written last, so that it has the scores
    assert "Distance from the float model" in told and f">{report.evaluations['talk']['kl']['value']:.4g}</td>" in told
    command = shlex.split(report.command)
    assert command[:4] == ["awq-ext", "quantize", "float", "int4"] and command[4:6] == ["--calib", "calib.txt"]
    assert (
        command[command.index("talk=rows.jsonl") - 1] == "--traffic"
        and "hf_se" not in command
        and "--device" not in command
    )
    for text in (told, card, (tmp_path / "int4" / "awq_report.json").read_text()):
        assert "hf_se" not in text and str(tmp_path) not in text
    before, after = (json.loads((tmp_path / "q.json").read_text())["bytes"][name] for name in ("before", "after"))
    assert report.bytes_before == before > after == report.bytes_after
    assert f"{before:,} → {after:,} bytes" in told


def test_what_is_scored_rounds_activations_as_its_readers_do(made: Path, tmp_path: Path) -> None:
    format = ["--format", "compressed-tensors-w8a8", "--set", "bits=8", "--set", "symmetric=true", "--group-size", -1]
    shown = quantize(made, tmp_path / "int8", *format, "--traffic", made / "code.txt")
    assert shown.exit_code == 0, shown.output
    measured = awq_ext.from_pretrained(tmp_path / "int8").awq_report.evaluations["code"]
    sizes = ["--reference", made / "float", "--seq-len", 64, "--tokens", 256, "--json", "-"]
    again = json.loads(run("eval", tmp_path / "int8", made / "code.txt", *sizes).stdout)["code"]
    assert measured["kl"] == again["kl"]
    assert "| activations | of layers of 8 bits: rounded to 8 bits" in (tmp_path / "int8" / "README.md").read_text()
    # the same weights, whose readers leave activations as they are
    shown = run("convert", tmp_path / "int8", tmp_path / "ct", "--format", "compressed-tensors")
    assert shown.exit_code == 0, shown.output
    exact = json.loads(run("eval", tmp_path / "ct", made / "code.txt", *sizes).stdout)["code"]
    assert exact["kl"]["value"] < again["kl"]["value"]
    assert "| activations |" not in (tmp_path / "ct" / "README.md").read_text()


def test_eval_puts_its_figures_into_the_card(made: Path, tmp_path: Path) -> None:
    assert quantize(made, tmp_path / "int4").exit_code == 0
    assert "| scores on held-out-calibration | KL" in (tmp_path / "int4" / "README.md").read_text()
    sizes = ["--reference", made / "float", "--seq-len", 64, "--tokens", 256, "--card"]
    for name in ("code", "calib"):  # one after the other
        shown = run("eval", tmp_path / "int4", made / f"{name}.txt", *sizes)
        assert shown.exit_code == 0, shown.output
    card = (tmp_path / "int4" / "README.md").read_text()
    assert card.count("| scores on code | KL") == card.count("| scores on calib | KL") == 1
    assert "not measured" not in card
    awq_ext.convert(tmp_path / "int4", tmp_path / "ct", format="compressed-tensors")
    assert "| scores on code | KL" in (tmp_path / "ct" / "README.md").read_text()
    (tmp_path / "int4" / "README.md").write_text("mine")
    assert run("eval", tmp_path / "int4", made / "code.txt", *sizes).exit_code == 0
    assert (tmp_path / "int4" / "README.md").read_text() == "mine"
    shown = run("eval", made / "float", made / "code.txt", "--card")
    assert shown.exit_code == 2 and "no directory of a quantized model" in shown.output
