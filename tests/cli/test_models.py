"""The commands that work on Hugging Face directories, on a tiny one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hf_directory
import pytest
import torch
from typer.testing import CliRunner

import awq_ext
from awq_ext import AwqConfig, cli
from awq_ext.cli import hf
from awq_ext.cli.options.settings import parse_method
from awq_ext.cli.texts import drawn_windows, windows

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
runner = CliRunner()
WIDE = {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    found = {name: folder / f"{name}.txt" for name in ("calib", "code", "prose")}
    for name, path in found.items():
        path.write_text(f"{name}: some text of this kind, again and again. " * 40)
    return found


@pytest.fixture(scope="module")
def quantized(model_dir: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "int4"
    shown = run("quantize", model_dir, out, *calibration(texts), "--group-size", 32, "--set", "n_grid=4")
    assert shown.exit_code == 0, shown.output
    assert "14 of 15 Linears quantized" in shown.output and f"written to {out} (awq)" in shown.output
    last = [line.strip() for line in shown.stdout.splitlines()[-5:]]
    assert last[0] == f"vLLM: vllm serve {out}" and last[2] == f'awq_ext: awq_ext.from_pretrained("{out}")'
    return out


@pytest.fixture(scope="module")
def broken(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files and directories with something wrong."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "blank.txt").write_text("")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "lines.jsonl").write_text('{"text": "one"}\nnothing\n')
    for name in ("silent", "damaged"):
        shutil.copytree(model_dir, folder / name)
    for file in (folder / "silent").glob("*token*"):
        file.unlink()
    # a family for which transformers makes a tokenizer of no words where there are no files
    (folder / "speechless").mkdir()
    (folder / "speechless" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}')
    for name in ("config.json", "awq_report.json"):
        (folder / "damaged" / name).write_text("{")
    return {path.stem: path for path in folder.iterdir()}


def run(*arguments: object):
    return runner.invoke(cli.app, list(map(str, arguments)), env=WIDE)


def calibration(texts: dict[str, Path]) -> list[object]:
    return ["--calib", texts["calib"], "--samples", 4, "--seq-len", 64]


def test_what_is_written_is_what_python_makes(model_dir: Path, texts: dict[str, Path], quantized: Path) -> None:
    by_hand = hf.load_model(model_dir)
    batches = drawn_windows([texts["calib"]], hf.load_tokenizer(model_dir), 4, 64)
    assert [tuple(batch.shape) for batch in batches] == [(1, 64)] * 4
    awq_ext.quantize(by_hand, batches, group_size=32, n_grid=4, fold="always", progress=False)
    loaded = hf.load_model(quantized)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, by_hand(batches[0]).logits)
    assert hf.load_tokenizer(quantized)("abc").input_ids == hf.load_tokenizer(model_dir)("abc").input_ids


def test_compare(model_dir: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    figures, table = tmp_path / "c.json", tmp_path / "c.md"
    options = ["--method", "rtn", "--method", "awq,clip=false,label=bare", "--tokens", 128, "--group-size", 32]
    traffic = ["--traffic", texts["code"], "--traffic", f"talk={texts['prose']}"]
    output = ["--json", figures, "--markdown", table]
    shown = run("compare", model_dir, *calibration(texts), *traffic, *options, *output)
    assert shown.exit_code == 0, shown.output
    assert "other programs: load 99.0 on " in shown.output
    for word in ("code: 126 tokens in 2 windows", "talk: 126 tokens", "bare", "perplexity"):
        assert word in shown.output and word in table.read_text()
    rows = json.loads(figures.read_text())["rows"]
    assert [row["label"] for row in rows] == ["float", "rtn", "bare"] and rows[2]["config"]["clip"] is False


def test_eval(model_dir: Path, texts: dict[str, Path], quantized: Path) -> None:
    shown = run(
        "eval",
        quantized,
        texts["code"],
        f"p={texts['prose']}",
        "--reference",
        model_dir,
        "--tokens",
        256,
        "--json",
        "-",
    )
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)  # the table goes to standard error
    assert re.search(r"perplexity\s+the reference's\s+kl", shown.stderr)
    assert set(figures) == {"code", "p"} and "top1: share of tokens" in shown.stderr
    assert "over windows (1 of code, 1 of p)" in shown.stderr.replace("\n", " ")
    assert 0 < figures["code"]["kl"]["value"] < 1
    samples = windows([texts["code"]], hf.load_tokenizer(model_dir), 1, 512)
    expected = awq_ext.evaluate(hf.load_model(quantized), samples)["perplexity"].value
    assert figures["code"]["perplexity"]["value"] == expected


def test_report(model_dir: Path, quantized: Path, tmp_path: Path) -> None:
    shown = run("report", quantized, "--json", tmp_path / "r.json")
    assert shown.exit_code == 0 and "model.layers.1.mlp.down_proj" in shown.output
    assert len(json.loads((tmp_path / "r.json").read_text())["layers"]) == 15
    page = run("report", quantized, tmp_path / "r.html")
    assert page.exit_code == 0 and "model.layers.1.mlp.down_proj" in (tmp_path / "r.html").read_text(encoding="utf-8")
    failed = run("report", model_dir)
    assert failed.exit_code == 1 and "holds no report" in failed.output


def test_inspect(model_dir: Path, quantized: Path, tmp_path: Path) -> None:
    shown = run("inspect", quantized)
    assert shown.exit_code == 0, shown.output
    for word in ("LlamaForCausalLM", "awq", "int4: 14", "32: 14", "14 of 15 Linears quantized"):
        assert word in shown.output
    plain = run("inspect", model_dir, "--json", tmp_path / "i.json")
    assert plain.exit_code == 0
    facts = json.loads((tmp_path / "i.json").read_text())
    assert facts["format"] == "float" and facts["tensors"]["F32"]["tensors"] == 21
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:5000])
    damaged = run("inspect", foreign)
    assert damaged.exit_code == 1 and "cannot be read" in damaged.output and "Traceback" not in damaged.output


def test_too_little_text_and_too_long_windows_are_noted(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--method", "rtn", "--samples", 9, "--seq-len", 400, "--group-size", 32, "--json", "-"]
    shown = run("quantize", model_dir, tmp_path / "out", "--calib", texts["calib"], *options)
    assert shown.exit_code == 0, shown.output
    assert "calibration text has 4 windows, 9 were asked for" in shown.stderr
    assert "windows of 400 tokens are longer than the 256" in shown.stderr
    assert json.loads(shown.stdout)["report"]["config"]["seq_len"] == 400


def test_skipping_more_layers_leaves_the_head_float(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """By identity too: some models have an output layer of another name."""
    skipped = ["--skip", "*.down_proj", "--method", "rtn", "--set", 'per_layer={"*.q_proj": {"group_size": 16}}']
    skipped += ["--format", "native"]
    shown = run("quantize", model_dir, tmp_path / "out", *calibration(texts), *skipped, "--json", tmp_path / "r.json")
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "r.json").read_text())["report"]
    assert report["config"]["skip"] == [*AwqConfig().skip, "*.down_proj"]
    assert {row["name"] for row in report["layers"] if row["status"] == "float"} == {
        "lm_head",
        *(f"model.layers.{i}.mlp.down_proj" for i in range(2)),
    }
    assert {row["group_size"] for row in report["layers"] if row["name"].endswith("q_proj")} == {16}


def test_a_missing_extra_is_said_before_the_work(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else real(name))
    shown = run("quantize", model_dir, tmp_path / "out", *calibration(texts), "--report", tmp_path / "r.html")
    assert shown.exit_code == 1 and "jinja2: pip install 'awq-ext[report]'" in shown.output
    assert list(tmp_path.iterdir()) == []


def test_models_of_different_vocabularies_cannot_be_compared(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    other = hf_directory.make(tmp_path / "other", vocab_size=300)
    shown = run("eval", model_dir, texts["code"], "--reference", other, "--tokens", 64, "--seq-len", 64)
    assert shown.exit_code == 1 and "has 260 tokens" in shown.output and "300: a reference" in shown.output


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors", "gptq"])
def test_inspect_reads_every_layout(model_dir: Path, texts: dict[str, Path], layout: str, tmp_path: Path) -> None:
    options = ["--format", layout, "--method", "rtn", "--group-size", 32]
    made = run("quantize", model_dir, tmp_path / "out", *calibration(texts), *options)
    assert made.exit_code == 0, made.output
    facts = json.loads(run("inspect", tmp_path / "out", "--json", "-").stdout)
    assert (
        facts["format"] == layout and facts["quantized_layers"] == {"int4": 14} and facts["group_sizes"] == {"32": 14}
    )
    assert facts["report"].startswith("14 of 15 Linears quantized")


@pytest.mark.parametrize(
    ("options", "symmetric"),
    [
        (["--format", "gptq"], True),
        (["--format", "gptq", "--set", "symmetric=false"], False),
        (["--format", "gguf", "--bits", 8], True),
        (["--format", "gguf"], False),
    ],
)
def test_layers_are_symmetric_where_readers_take_no_others(
    model_dir: Path, texts: dict[str, Path], options: list[Any], symmetric: bool, tmp_path: Path
) -> None:
    """Of 8 bits in gguf others cannot be written; in gptq they end, after all the work, at the first zero of 0."""
    made = run("quantize", model_dir, tmp_path / "out", *calibration(texts), "--method", "rtn", *options)
    assert ("note: symmetric, as readers of" in made.output) == (symmetric and "symmetric=false" not in options)
    if made.exit_code == 0:
        report = json.loads((tmp_path / "out" / "awq_report.json").read_text())
        assert report["config"]["symmetric"] == symmetric
        if "gptq" in options:  # which vLLM takes symmetric alone
            assert ("vllm serve" in made.output) == symmetric
            assert ("vllm serve" in run("inspect", tmp_path / "out").output) == symmetric
            assert ("vllm serve" in (tmp_path / "out" / "README.md").read_text()) == symmetric
    else:  # whether there is such a zero is a matter of the weights
        assert not symmetric and "a zero of 0" in made.output


def test_only_layers_of_eight_bits_become_symmetric(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    options = ["--format", "gguf", "--per-layer", "*.down_proj:bits=8", "--head", "int8", "--method", "rtn"]
    made = run("quantize", model_dir, tmp_path / "out", *calibration(texts), *options)
    assert made.exit_code == 0 and "note: symmetric, as readers of gguf" in made.output, made.output
    config = json.loads((tmp_path / "out" / "awq_report.json").read_text())["config"]
    symmetric = {"symmetric": True}
    assert not config["symmetric"] and config["per_layer"] == {
        "lm_head": symmetric,
        "*.down_proj": {"bits": 8, **symmetric},
    }


def test_eight_bits_on_the_command_line(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    options = ["--format", "native", "--method", "rtn", "--group-size", 32]
    for name, more, widths in (
        ("all", ["--set", "bits=8"], {"int8": 14}),
        ("some", ["--set", 'per_layer={"*.down_proj": {"bits": 8}}'], {"int4": 12, "int8": 2}),
    ):
        made = run("quantize", model_dir, tmp_path / name, *calibration(texts), *options, *more)
        assert made.exit_code == 0, made.output
        facts = json.loads(run("inspect", tmp_path / name, "--json", "-").stdout)
        assert facts["quantized_layers"] == widths


def test_a_missing_shard_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    shown = run("inspect", tmp_path / "m")
    assert shown.exit_code == 1 and "names model-00002-of-00002.safetensors, which is missing" in shown.output


def test_windows_come_from_every_text(model_dir: Path, texts: dict[str, Path]) -> None:
    tokenizer = hf.load_tokenizer(model_dir)
    found = windows(list(texts.values()), tokenizer, 5, 16)
    assert len(found) == 5 and tokenizer.decode(found[0][0]).startswith("calib: some")
    assert tokenizer.decode(found[2][0]).startswith("code: some") and tokenizer.decode(found[4][0]).startswith("prose")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "{model}", "{model}", "--calib", "{calib}"], 2, "would be lost"),
        (["quantize", "{model}", "{new}"], 2, "calib"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--set", "bits=9"], 2, "bits=9"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--set", "nothing"], 2, "FIELD=VALUE"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--set", "packed=false"], 2, "awq-ext compare MODEL"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--seq-len", "100000"], 1, "fewer than one window"),
        (
            ["quantize", "{model}", "{new}", "--calib", "{calib}", "--dtype", "int8"],
            2,
            "int8 is not one of auto, bfloat16",
        ),
        (["quantize", "{empty}", "{new}", "--calib", "{calib}"], 1, "has no config.json"),
        (["compare", "{model}", "--calib", "{calib}", "--traffic", "nowhere.txt"], 1, "nowhere.txt is no file"),
        (
            ["compare", "{model}", "--calib", "{calib}", "--traffic", "{calib}", "--method", "finest"],
            2,
            "finest is not one of awq, rtn, gptq, awq+gptq, fast, balanced, best",
        ),
        (["compare", "{model}", "--calib", "{calib}", "--traffic", "{calib}", "--traffic", "{calib}"], 1, "two texts"),
        (["eval", "{model}"], 2, "PATH"),
        (["eval", "{nowhere}", "{calib}"], 2, "does not exist"),
        (["inspect", "{empty}"], 1, "nothing to inspect"),
        (["quantize", "{model}", "{model}", "--calib", "{calib}", "--overwrite"], 2, "would be lost"),
        (["quantize", "{model}", "{calib}/new", "--calib", "{calib}"], 2, "calib.txt is a file"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--method", "best"], 2, "give --effort best"),
        (["quantize", "{model}", "{new}", "--calib", "{calib}", "--set", "nothing=1"], 2, "no field nothing"),
        (["quantize", "{model}", "{new}", "--calib", "{nowhere}"], 2, "does not exist"),
        (["quantize", "{model}", "{new}", "--calib", "{blank}"], 1, "blank.txt has 0 tokens"),
        (["quantize", "{model}", "{new}", "--calib", "{bytes}"], 1, "bytes.txt is no UTF-8 text"),
        (["quantize", "{model}", "{new}", "--calib", "{lines}"], 1, "lines.jsonl, line 2 is no JSON"),
        (["quantize", "{silent}", "{new}", "--calib", "{calib}"], 1, "it has no tokenizer"),
        (["quantize", "{speechless}", "{new}", "--calib", "{calib}"], 1, "it has no tokenizer"),
        (["eval", "{damaged}", "{calib}"], 1, "config.json is damaged"),
        (["report", "{damaged}"], 1, "awq_report.json is damaged"),
        (["inspect", "{damaged}"], 1, "config.json is damaged"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    model_dir: Path,
    texts: dict[str, Path],
    broken: dict[str, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / name for name in ("new", "empty", "nowhere")} | {"model": model_dir} | texts | broken
    shown = run(*(argument.format(**names) for argument in arguments))
    assert shown.exit_code == code
    told = re.sub(r"[│╭╮╰╯─\s]", "", shown.output)  # out of its box, whose lines end anywhere, in words too
    assert "".join(message.split()) in told and "Traceback" not in told
    assert not (tmp_path / "new").exists()


def test_without_a_group_size_groups_are_as_large_as_fit(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """64 and 96 channels: both are whole groups of 32."""
    shown = run("quantize", model_dir, tmp_path / "x", *calibration(texts), "--method", "rtn")
    assert shown.exit_code == 0 and "groups of 32: 128 does not divide every width" in shown.output
    assert json.loads((tmp_path / "x" / "awq_report.json").read_text())["config"]["group_size"] == 32
    sizes = ("--samples", 2, "--seq-len", 64, "--tokens", 64, "--method", "rtn", "--json", tmp_path / "c.json")
    for more, size in ((), 32), (("--bits", 3, "--set", "packed=false"), 32), (("--group-size", 128), 128):
        traffic = ("--traffic", next(iter(texts.values())), "--overwrite")
        shown = run("compare", model_dir, *calibration(texts)[:2], *traffic, *sizes, *more)
        assert shown.exit_code == 0, shown.output
        found = json.loads((tmp_path / "c.json").read_text())
        assert found["rows"][1]["config"]["group_size"] == size
        assert ("groups of 32: 128" in shown.output) == (size == 32)
        assert bool(found["next"]) == (not more or size == 128)
        assert found["next"] or "cannot hold this model" not in shown.output


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--group-size", 128], ("in_features=64 is not a multiple of --group-size 128", "--format native")),
        (["--group-size", 32, "--set", "fold=never"], ("its input is scaled at run time", "--set fold=always")),
        (["--group-size", 32, "--format", "modelopt"], ("--set symmetric=true",)),
        (["--group-size", 32, "--set", "bits=8"], ("it has 8 bits, not 4", "--format native")),
        (["--group-size", 32, "--set", 'per_layer={"*up_proj": {"group_size": 16}}'], ("different group sizes",)),
    ],
)
def test_what_the_format_cannot_hold_is_said_before_the_work(
    options: list[object],
    messages: tuple[str, ...],
    model_dir: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch,
) -> None:
    monkeypatch.setattr(awq_ext, "quantize", lambda *arguments, **settings: pytest.fail("the work began"))
    shown = run("quantize", model_dir, tmp_path / "x", *calibration(texts), *options)
    assert shown.exit_code == 1 and not (tmp_path / "x").exists()
    for message in messages:
        assert message in shown.output


def test_the_default_is_what_transformers_and_others_load(model_dir: Path, quantized: Path, tmp_path: Path) -> None:
    def config(folder: Path) -> dict:
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    assert config(quantized)["quant_method"] == "awq"
    awq_ext.convert(quantized, tmp_path / "native", format="native")
    shown = run("convert", tmp_path / "native", tmp_path / "x")
    assert shown.exit_code == 0 and "vllm serve" in shown.output
    assert config(tmp_path / "x")["quant_method"] == "awq"
    shown = run("convert", quantized, tmp_path / "again", "--format", "native")
    assert shown.exit_code == 0 and "no other tool knows the native layout" in shown.output


def test_methods_are_parsed() -> None:
    assert parse_method("awq,clip=false,n_grid=10") == {
        "label": "awq,clip=false,n_grid=10",
        "method": "awq",
        "clip": False,
        "n_grid": 10,
    }
    assert parse_method("rtn,label=plain") == {"label": "plain", "method": "rtn"}
