"""What the commands tell beside their work: what is left to do, what went wrong, who loads a result, and that help is quick."""

from __future__ import annotations

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_directory
import pytest
import torch
from programs import run_python
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli
from awq_ext.cli import compare, hf, texts
from awq_ext.cli.options.settings import parse_per_layer
from awq_ext.config import AwqConfig
from awq_ext.evaluation import held_out
from awq_ext.streaming.working import Working

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import


def run(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "400", **environment})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model called ``llama-4-7b``, texts, and what quantize made of it."""
    folder = tmp_path_factory.mktemp("made")
    hf_directory.make(folder / "llama-4-7b")
    for name in ("calib", "code"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} {i}" for i in range(300)))
    shown = quantize(folder, folder / "int4", "--json", folder / "q.json")
    assert shown.exit_code == 0, shown.output
    (folder / "said.txt").write_text(shown.stdout)
    return folder


def quantize(made: Path, out: Path, *more: object) -> Any:
    sizes = ["--samples", 4, "--seq-len", 64, "--group-size", 32, "--method", "rtn"]
    return run("quantize", made / "llama-4-7b", out, "--calib", made / "calib.txt", *sizes, *more)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["--version"], [], ["quantize", "-h"], ["inspect", "--help"]]
)
def test_help_needs_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from awq_ext.cli import main; sys.argv = ['awq-ext', *sys.argv[1:]]\n"
        "try: main()\nfinally: print('loaded:', [x for x in ('torch', 'transformers') if x in sys.modules])"
    )
    done = run_python("-c", program, *arguments)
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []" and len(done.stdout.splitlines()) > 1


def test_names_are_loaded_at_their_first_use() -> None:
    program = (
        "import sys, awq_ext; assert 'torch' not in sys.modules and 'quantize' in dir(awq_ext)\n"
        "from awq_ext import _C; assert _C.isa(); assert callable(awq_ext.quantize)\n"
        "import torch; print(torch.ops.awq_ext.quant_linear.default)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0 and "quant_linear" in done.stdout, done.stderr
    done = run_python("-c", "import torch, awq_ext; print(torch.ops.awq_ext.quant_linear.default)")
    assert done.returncode == 0, done.stderr  # as a program needs that only loads an exported one


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(awq_ext.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {node.module: tuple(name.name for name in node.names) for node in block.body if node.level}
    assert seen == awq_ext._PLACES
    assert sorted(awq_ext.__all__) == sorted(["__version__", *(name for names in seen.values() for name in names)])
    for place, names in seen.items():
        for name in names:
            assert getattr(awq_ext, name) is getattr(import_module(f"awq_ext.{place}"), name)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        awq_ext.quantise  # noqa: B018


def test_no_command_shows_what_to_type() -> None:
    shown = run()
    typed = [line for line in shown.stdout.splitlines() if line.startswith("awq-ext ")]
    assert shown.exit_code == 2 and [line.split()[1] for line in typed[:3]] == ["quantize", "eval", "demo"]
    assert len(shown.stdout.splitlines()) < 8
    assert run("--version").stdout == f"awq-ext {awq_ext.__version__}\n"


def test_quantize_ends_with_what_it_cost_and_what_is_next(made: Path) -> None:
    said, figures = (made / "said.txt").read_text(), json.loads((made / "q.json").read_text())
    found = figures["report"]["evaluations"][held_out.HELD_OUT]
    assert (
        f"KL divergence from the float model {found['kl']['value']:.3f}"[:-2] in said
        and "that were left out of calibration" in said
    )
    assert 0 < found["kl"]["value"] < held_out.LARGE and found["tokens"] == 4 * 63
    assert re.search(r"size: [\d.]+ KiB before, [\d.]+ KiB after \(\d+%\)", said)
    assert figures["bytes"]["after"] < figures["bytes"]["before"]
    assert "| scores on held-out-calibration | KL divergence" in (made / "int4" / "README.md").read_text()
    assert awq_ext.from_pretrained(made / "int4").awq_report.evaluations[held_out.HELD_OUT] == found
    last = said.splitlines()[-1]
    assert last == f"next: {figures['next']}" and figures["next"].startswith("awq-ext eval ")
    (made / "TEXT.txt").write_text((made / "code.txt").read_text())
    words = [word.replace("TEXT.txt", str(made / "TEXT.txt")) for word in shlex.split(figures["next"])[1:]]
    assert run(*words, "--seq-len", 64, "--tokens", 128).exit_code == 0


def test_the_figure_is_that_of_the_two_models_on_unseen_text(made: Path) -> None:
    tokenizer = hf.load_tokenizer(made / "llama-4-7b")
    seen, left = texts.drawn_and_left([made / "calib.txt"], tokenizer, 4, 64, left=held_out.WINDOWS)
    assert len(left) == 4 and not any(torch.equal(one, other) for one in seen for other in left)
    assert all(
        torch.equal(a, b)
        for a, b in zip(seen, texts.drawn_windows([made / "calib.txt"], tokenizer, 4, 64), strict=True)
    )
    models = [hf.load_model(made / name) for name in ("int4", "llama-4-7b")]
    expected = awq_ext.evaluate(models[0], left, reference=models[1])
    found = json.loads((made / "q.json").read_text())["report"]["evaluations"][held_out.HELD_OUT]
    assert found["kl"]["value"] == pytest.approx(expected["kl"].value, rel=1e-3)


@pytest.mark.parametrize("size", [40, 40_000])
def test_windows_left_out_share_nothing_with_those_drawn(size: int, made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"{i:07}" for i in range(size)))
    tokenizer = hf.load_tokenizer(made / "llama-4-7b")
    windows = texts.drawn_and_left([tmp_path / "a.txt"], tokenizer, 6, 32, left=3)
    text = (tmp_path / "a.txt").read_text()
    places = [[text.index(tokenizer.decode(window[0])) for window in part] for part in windows]
    assert len(places[0]) == 6 and len(places[1]) == 3
    assert all(abs(one - other) >= 32 for one in places[0] for other in places[1])


def test_too_little_text_is_said(made: Path, tmp_path: Path) -> None:
    shown = quantize(made, tmp_path / "out", "--samples", 500)
    assert shown.exit_code == 0 and "all of the text went into calibration windows" in shown.stderr
    assert "KL divergence" not in shown.stdout and "not measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_logits_is_quantized_nevertheless(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "logits_of", lambda output: None)
    shown = quantize(made, tmp_path / "out")
    assert shown.exit_code == 0 and "its divergence cannot be measured" in shown.stderr, shown.output
    assert "KL divergence" not in shown.stdout and (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_result_is_said_in_words(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Working.quantize

    def broken(at: Working, *arguments: Any) -> Any:
        made = real(at, *arguments)
        with torch.no_grad():
            at.model.lm_head.weight.mul_(factor)
        return made

    monkeypatch.setattr(Working, "quantize", broken)
    for factor, says in ((-30.0, "far from the float one"), (float("nan"), "not finite: it is broken")):
        shown = quantize(made, tmp_path / f"{factor}")
        assert shown.exit_code == 0 and says in shown.stderr, shown.output
        assert shown.stdout.splitlines()[-1].startswith("next: awq-ext compare ")


def test_a_quantized_model_is_not_quantized_again(made: Path, tmp_path: Path) -> None:
    shown = run("quantize", made / "int4", tmp_path / "out", "--calib", made / "calib.txt")
    assert shown.exit_code == 2 and "int4 is already int4 (awq): give the float model" in shown.output
    assert not (tmp_path / "out").exists()


def test_options_of_their_own(made: Path, tmp_path: Path) -> None:
    more = ["--bits", 8, "--format", "Native", "--device", "cpu", "--per-layer", "*.down_proj:bits=4,group_size=16"]
    more += ["--per-layer", '{"*.up_proj": {"group_size": 64}}', "--json", tmp_path / "q.json"]
    shown = quantize(made, tmp_path / "out", *more)
    assert shown.exit_code == 0, shown.output
    rows = json.loads((tmp_path / "q.json").read_text())["report"]["layers"]
    found = {
        row["name"].rpartition(".")[2]: (row["bits"], row["group_size"]) for row in rows if row["status"] != "float"
    }
    assert (found["q_proj"], found["down_proj"], found["up_proj"]) == ((8, 32), (4, 16), (8, 64))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--bits", 9], "Invalid value for '--bits'"),
        (["--bits", 3], "Invalid value for --bits: directories hold 4 or 8 bits"),
        (["--device", "nowhere"], "torch cannot compute on 'nowhere' here"),
        (["--device", "meta"], "it holds no values"),
        (["--per-layer", "*.down_proj"], "is not PATTERN:FIELD=VALUE"),
        (["--per-layer", "{"], "is no JSON"),
        (["--per-layer", "*.down_proj:bitz=8"], "bitz"),
        (["--max-memory", "20mbb"], "'20mbb' is no size: give bytes, or a number with a unit"),
        (["--report", "x.pdf"], "give a name that ends in .html or .htm"),
    ],
)
def test_a_mistake_in_them_is_a_usage_error(more: list[object], says: str, made: Path, tmp_path: Path) -> None:
    shown = quantize(made, tmp_path / "out", *more)
    assert shown.exit_code == 2 and says in shown.output and not (tmp_path / "out").exists(), shown.output


def test_a_page_is_no_pdf(made: Path, tmp_path: Path) -> None:
    shown = run("report", made / "int4", tmp_path / "x.pdf")
    assert shown.exit_code == 2 and ".html or .htm" in shown.output and list(tmp_path.iterdir()) == []


def test_patterns_may_hold_colons() -> None:
    assert parse_per_layer("re:.*[.]q:bits=8") == {"re:.*[.]q": {"bits": 8}}


def test_inspect_says_who_loads_a_directory(made: Path) -> None:
    shown = run("inspect", made / "int4")
    assert f"vLLM: vllm serve {made / 'int4'}" in shown.stdout and "awq_ext: awq_ext.from_pretrained(" in shown.stdout
    facts = json.loads(run("inspect", made / "llama-4-7b", "--json", "-").stdout)
    assert [one["program"] for one in facts["loaded_by"]] == ["vLLM", "Transformers"]


def test_digits_in_names_have_no_colour(made: Path) -> None:
    shown = run("inspect", made / "llama-4-7b", FORCE_COLOR="1", TERM="xterm-256color")
    assert "llama-4-7b" in shown.stdout
    shown = run("report", made / "llama-4-7b", FORCE_COLOR="1", TERM="xterm-256color")
    assert "llama-4-7b holds no report" in shown.stderr and "\x1b[" in shown.stderr  # "error:" alone is red


def test_compare_ends_with_a_verdict_and_a_command_that_works(made: Path, tmp_path: Path) -> None:
    sizes = ["--samples", 4, "--seq-len", 64, "--group-size", 32, "--tokens", 128, "--set", "n_grid=2"]
    calib = ["--calib", made / "calib.txt", "--traffic", made / "code.txt"]
    shown = run("compare", made / "llama-4-7b", *calib, *sizes, "--json", tmp_path / "c.json")
    assert shown.exit_code == 0, shown.output
    figures, last = json.loads((tmp_path / "c.json").read_text()), shown.stdout.splitlines()[-2:]
    assert last == [figures["verdict"], f"next: {figures['next']}"] and figures["take"] in ("rtn", "awq")
    assert "% of the float model's size)" in figures["verdict"]
    words = shlex.split(figures["next"])[1:]
    assert words[2] == "llama-4-7b-quantized"
    words[2] = str(tmp_path / "out")
    assert run(*words, "--json", tmp_path / "q.json").exit_code == 0
    config = json.loads((tmp_path / "q.json").read_text())["report"]["config"]
    taken = next(row["config"] for row in figures["rows"] if row["label"] == figures["take"])
    assert {**config, "fold": ""} == {**taken, "fold": ""}


def test_the_command_names_a_format_that_holds_a_last_group_that_is_short(made: Path, tmp_path: Path) -> None:
    """96 channels are a group of 64 and a short one, for which the usual format has no place."""
    sizes = ["--samples", 2, "--seq-len", 64, "--group-size", 64, "--tokens", 128, "--method", "rtn"]
    shown = run("compare", made / "llama-4-7b", "--calib", made / "calib.txt", "--traffic", made / "code.txt", *sizes)
    assert shown.exit_code == 0, shown.output
    words = shlex.split(shown.stdout.splitlines()[-1])[2:]
    assert words[words.index("--format") + 1] == "native"
    why = "awq cannot hold this model: in_features=96 is not a multiple of --group-size 64: quantize with --group-size 32, or"
    assert f"note: the next command writes the format native, which awq_ext alone loads. {why}" in shown.stderr
    words[2] = str(tmp_path / "out")
    assert run(*words).exit_code == 0


def test_the_command_has_the_settings_of_the_method() -> None:
    usual = AwqConfig().to_dict()
    config = usual | {"method": "awq+gptq", "bits": 8, "clip": False, "only": ["*.mlp.*"]}
    words = shlex.split(compare.next_command(["quantize", "M", "O"], config))
    assert words[4:] == ["--method", "awq+gptq", "--bits", "8", "--set", "clip=false", "--set", 'only=["*.mlp.*"]']
    assert compare.next_command([], usual | {"packed": False}) == ""
    config = AwqConfig(effort="balanced", group_size=64, damping=0.5).to_dict()
    words = shlex.split(compare.next_command(["quantize", "M", "O"], config, "balanced"))
    assert words[4:] == ["--effort", "balanced", "--group-size", "64", "--set", "damping=0.5"]
    implied = {"builtin_text": False, "generated_tokens": 0.0, "random_tokens": 0.0}  # by --calib builtin
    config = AwqConfig(effort="balanced", **implied).to_dict()
    words = shlex.split(compare.next_command(["quantize", "M", "O"], config, "balanced", implied))
    assert words[4:] == ["--effort", "balanced"]
