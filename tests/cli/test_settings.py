"""Settings on the command line: names of other tools, mistyped ones, and what cannot be written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hf_directory
import pytest
import torch
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
runner = CliRunner()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "calib.txt"
    path.write_text("some text of this kind, again and again. " * 40)
    return path


def run(*arguments: object):
    return runner.invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "1000"})


def quantize(model_dir: Path, calib: Path, out: Path, *more: object):
    return run("quantize", model_dir, out, "--calib", calib, "--samples", 2, "--seq-len", 64, *more)


def test_autoawqs_names_work(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    names = ("w_bit=4", "q_group_size=32", "zero_point=false", "version=GEMM", "method=rtn")
    settings = [part for name in names for part in ("--set", name)]
    shown = quantize(model_dir, calib, tmp_path / "out", *settings, "--json", "-")
    assert shown.exit_code == 0, shown.output
    config = json.loads(shown.stdout)["report"]["config"]
    assert (config["group_size"], config["symmetric"], config["method"]) == (32, True, "rtn")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "group_sise=64"), "did you mean group_size?"),
        (("--set", "sym=true"), "did you mean symmetric?"),
        (("--set", "clip=yes"), "clip='yes': choose one of 'auto', True, False"),
        (("--set", "max_calib_tokens=-1"), "max_calib_tokens=-1: at least 0 is needed; 0 is no limit"),
        (("--set", "max_calib_tokens=abc"), "max_calib_tokens='abc': an int is needed, not str"),
        (("--set", "skip=*.router"), "give a tuple of name patterns"),
        (("--skip", "re:("), "'re:(' is no regular expression"),
        (("--head", "int5"), "int5 is not one of float, int8, int4"),
        (("--head", "int8", "--set", "quantize_head=true"), "--head int8 sets head, which --set gives too (int4)"),
        (("--method", "gptq+awq"), ": did you mean awq+gptq?"),
        (("--method", "aqw"), "aqw is not one of awq, rtn, gptq, awq+gptq: did you mean awq?"),
        (("--method", "Balanced"), "Balanced is an effort, no method: give --effort balanced"),
        (("--per-layer", "*.down_proj:bit=8"), "Invalid value for --per-layer: AwqConfig.per_layer"),
        (("--set", 'per_layer={"*.down_proj": {"bit": 8}}'), "Invalid value for --set: AwqConfig.per_layer"),
        (("--format", "compresed-tensors"), ": did you mean compressed-tensors?"),
        (("--dtype", "bf16"), "bf16 is not one of auto, bfloat16"),
        (("--set", "bits=3"), "awq-ext compare MODEL"),
        (("--set", "w_bit=3"), "--set bits=3 --set packed=false"),
        (("--set", "bits=5"), "Invalid value for --set: directories hold 4 or 8 bits, packed"),
        (("--set", "bits=3", "--set", "packed=false"), "model.save_pretrained(OUT)"),
    ],
)
def test_a_mistake_is_a_usage_error(
    model_dir: Path, calib: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    shown = quantize(model_dir, calib, tmp_path / "out", *options)
    assert shown.exit_code == 2 and says in shown.output and not (tmp_path / "out").exists(), shown.output


def test_a_pattern_for_no_layer_is_one_line(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    shown = quantize(model_dir, calib, tmp_path / "out", "--skip", "down_proj")
    assert (
        shown.exit_code == 1
        and "skip='down_proj' fits none of the 15 layers: did you mean *.down_proj?" in shown.output
    )


def test_skip_adds_wherever_it_is_given(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    given = ("--skip", "re:.*up_proj", "--set", 'skip=["*.down_proj"]', "--set", "method=rtn", "--json", "-")
    given += ("--format", "native")  # the group size does not divide the widths
    rows = json.loads(quantize(model_dir, calib, tmp_path / "out", *given).stdout)["report"]["layers"]
    stay = {row["name"].rpartition(".")[2] for row in rows if row["status"] == "float"}
    assert stay == {"up_proj", "down_proj", "lm_head"}
    shown = quantize(
        model_dir, calib, tmp_path / "all", "--set", "quantize_head=true", "--set", "method=rtn", *given[-2:]
    )
    assert "15 of 15 Linears quantized" in shown.output


def test_what_the_error_about_other_bits_names_works(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    traffic = ("--traffic", calib, "--tokens", 128, "--samples", 2, "--seq-len", 64)
    bits = ("--set", "bits=3", "--set", "packed=false")
    shown = run("compare", model_dir, "--calib", calib, *traffic, "--method", "rtn", *bits, "--json", tmp_path / "c")
    assert shown.exit_code == 0, shown.output
    assert json.loads((tmp_path / "c").read_text())["rows"][1]["config"]["bits"] == 3
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.arange(64)[None]
    awq_ext.quantize(model, [ids], bits=3, packed=False, method="rtn", progress=False)
    model.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_the_output_layer(model_dir: Path, calib: Path, tmp_path: Path, head: str) -> None:
    given = ("--head", head, "--method", "rtn", "--format", "native", "--json", "-")
    rows = json.loads(quantize(model_dir, calib, tmp_path / "out", *given).stdout)["report"]["layers"]
    assert {row["name"]: row["status"] for row in rows}["lm_head"] == head
    loaded = awq_ext.from_pretrained(tmp_path / "out")
    assert f"int{loaded.lm_head.bits}" == head


def test_a_format_that_cannot_hold_the_output_layer_says_so_before_the_work(
    model_dir: Path, calib: Path, tmp_path: Path
) -> None:
    shown = quantize(model_dir, calib, tmp_path / "out", "--head", "int4", "--group-size", 64, "--method", "rtn")
    assert shown.exit_code == 1 and "nothing was quantized yet" in shown.output
    assert "lm_head is quantized" in shown.output and "use --format compressed-tensors" in shown.output
    assert not (tmp_path / "out").exists()


def test_compare_takes_the_output_layer(model_dir: Path, calib: Path) -> None:
    shown = run(
        *("compare", model_dir, "--calib", calib, "--traffic", calib, "--samples", 2, "--seq-len", 64, "--tokens", 128),
        *("--method", "rtn", "--method", "rtn,head=float,label=floating", "--head", "int8", "--json", "-"),
    )
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["rows"]
    assert [row["config"] and row["config"]["head"] for row in rows] == [None, "int8", "float"]
    assert rows[1]["size_bytes"] < rows[2]["size_bytes"]


def test_efforts_and_the_builtin_texts(model_dir: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    given = ("--samples", 2, "--seq-len", 64, "--format", "native", "--set", "tune_scales=1", "--json", figures)
    result = run("quantize", model_dir, out, "--calib", "builtin", "--effort", "best", *given)
    assert result.exit_code == 0, result.output
    config = json.loads(figures.read_text())["report"]["config"]
    assert (config["method"], config["tune_scales"]) == ("awq+gptq", 1)
    assert (config["generated_tokens"], config["random_tokens"]) == (0, 0)
    assert config["builtin_text"] is False  # they are what is given
    again = run(
        "quantize", model_dir, tmp_path / "all", "--calib", "builtin", "--method", "rtn", *given[2:6], "--samples", 999
    )
    assert again.exit_code == 0 and "were asked for" not in again.output  # nobody can make these texts longer
    assert "give text of yours with --traffic" in " ".join(again.output.split())


def test_efforts_calibrate_on_the_builtin_texts_beside_those_given(
    model_dir: Path, calib: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    result = quantize(model_dir, calib, tmp_path / "out", "--effort", "fast", "--group-size", 32, "--json", figures)
    assert result.exit_code == 0, result.output
    [note] = [one for one in json.loads(figures.read_text())["report"]["notes"] if "calibrated on 2 batches" in one]
    assert re.search(r"and on \d\d+ windows of the built-in texts", note)
    assert f"note: {note}" in result.stderr
    assert "\nmethod: awq+gptq (effort fast), 4 bits, groups of 32\n" in "\n" + result.stdout


def test_text_that_the_limit_leaves_out_is_told(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    shown = quantize(model_dir, calib, tmp_path / "out", "--group-size", 32, "--set", "max_calib_tokens=64")
    assert shown.exit_code == 0, shown.output
    assert "note: calibrated on 64 of the 128 tokens given (max_calib_tokens=64, where 0 is no limit)" in shown.stderr


def test_compare_takes_efforts_as_methods(model_dir: Path, calib: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    given = ("--calib", calib, "--traffic", calib, "--samples", 2, "--seq-len", 64, "--tokens", 64, "--json", figures)
    result = run(
        "compare", model_dir, *given, "--method", "rtn", "--method", "fast", "--method", "balanced,tune_scales=1"
    )
    assert result.exit_code == 0, result.output
    assert "calib.txt: calibrated on and scored on" in result.stderr
    rows = {row["label"]: row["config"] for row in json.loads(figures.read_text())["rows"]}
    assert (rows["fast"]["method"], rows["fast"]["objective"]) == ("awq+gptq", "layer")
    assert (rows["balanced,tune_scales=1"]["method"], rows["balanced,tune_scales=1"]["tune_scales"]) == ("awq+gptq", 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--effort", "bets"), "did you mean best"),
        (("--effort", "fast", "--method", "rtn"), "the method rtn searches none"),
        (("--effort", "fast", "--set", "method=rtn"), "the method rtn searches none"),
        (("--calib", "."), "is a directory"),
    ],
)
def test_a_wrong_effort_or_text_is_a_usage_error(
    model_dir: Path, calib: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    result = quantize(model_dir, calib, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.output
