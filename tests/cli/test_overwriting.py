"""No command replaces a file or a checkpoint that it was not told to."""

from __future__ import annotations

from pathlib import Path

import hf_directory
import pytest
from typer.testing import CliRunner

from awq_ext import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    hf_directory.make(folder / "float")
    (folder / "calib.txt").write_text("some text of this kind, again and again. " * 40)
    found = {"float": folder / "float", "calib": folder / "calib.txt", "int4": folder / "int4"}
    assert quantize(found, found["int4"]).exit_code == 0
    return found


def run(*arguments: object):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "1000"})


def quantize(made: dict[str, Path], out: Path, *more: object):
    options = ["--samples", 2, "--seq-len", 64, "--method", "rtn", "--group-size", 32, "--format", "awq"]
    return run("quantize", made["float"], out, "--calib", made["calib"], *options, *more)


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_a_float_checkpoint_is_replaced_only_by_name(command: str, made: dict[str, Path], tmp_path: Path) -> None:
    def to(out: Path, *more: object):
        if command == "quantize":
            return quantize(made, out, *more)
        return run("convert", made["int4"], out, "--format", "compressed-tensors", *more)

    other = hf_directory.make(tmp_path / "other")
    before = (other / WEIGHTS).read_bytes()
    for more in ((), ("--overwrite",), ("--overwrite-float", tmp_path)):
        shown = to(other, *more)
        assert shown.exit_code == 2 and (other / WEIGHTS).read_bytes() == before, shown.output
    assert f"--overwrite-float {other}" in to(other, "--overwrite").output
    shown = to(other, "--overwrite-float", other)
    assert shown.exit_code == 0 and (other / WEIGHTS).read_bytes() != before, shown.output
    # now it is a quantized one
    assert to(other).exit_code == 2
    assert to(other, "--overwrite").exit_code == 0


def test_the_source_is_never_replaced(made: dict[str, Path]) -> None:
    before = (made["float"] / WEIGHTS).read_bytes()
    for more in (("--overwrite",), ("--overwrite-float", made["float"])):
        assert quantize(made, made["float"], *more).exit_code == 2
        assert run("convert", made["int4"], made["int4"], *more).exit_code == 2
    assert (made["float"] / WEIGHTS).read_bytes() == before


def test_files_are_not_replaced_unasked(made: dict[str, Path], tmp_path: Path) -> None:
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    for file in (page, figures):
        file.write_text("mine")
    for arguments in (("report", made["int4"], page), ("report", made["int4"], "--json", figures)):
        shown = run(*arguments)
        assert shown.exit_code == 2 and "exists: give another, or --overwrite" in shown.output
    for command in (["inspect", made["int4"]], ["eval", made["float"], made["calib"]], ["doctor"], ["demo"], ["bench"]):
        assert run(*command, "--json", figures).exit_code == 2
    assert page.read_text() == figures.read_text() == "mine"
    assert run("report", made["int4"], page, "--json", figures, "--overwrite").exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!") and figures.read_text().startswith("{")
