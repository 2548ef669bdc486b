"""What the documentation shows runs as typed: the README's example and the snippets on comparing."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import hf_directory
import models
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli

ROOT = Path(__file__).parents[2]


def snippets(file: str, language: str) -> list[str]:
    """Code blocks in their order."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured elsewhere."""
    monkeypatch.setattr(
        sys.modules["awq_ext.evaluation.compare"], "race", lambda runners, _: dict.fromkeys(runners, 1.0)
    )


def names() -> dict[str, Any]:
    """What the snippets take for granted."""
    case = models.make("llama")
    codes, others = models.token_batches((40, 40, 40)), models.token_batches((30, 30))
    classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    encoder, float_encoder = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
    return {
        "awq_ext": awq_ext,
        "model": case.model,
        "calib_loader": case.batches,
        "code_windows": codes,
        "json_windows": others,
        "windows": codes,
        "traffic": {"code": codes, "json": others},
        "quantized": awq_ext.quantize(models.make("llama").model, case.batches, group_size=16, progress=False),
        "classifier": classifier,
        "pairs": [(torch.randn(8, 32), torch.randint(0, 4, (8,))) for _ in range(3)],
        "encoder": encoder,
        "float_encoder": float_encoder,
        "batches": [torch.randn(4, 32) for _ in range(3)],
    }


def test_the_page_on_comparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known = names()
    found = snippets("docs/compare.md", "python")
    assert len(found) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three windows are few, and say so
        for snippet in found:
            exec(compile(snippet, "docs/compare.md", "exec"), known)
    assert (tmp_path / "comparison.json").exists()
    shown = capsys.readouterr().out
    for words in ("awq, no clip", "Top 1 % of the channels", "Cost of quantizing one part alone"):
        assert words in shown


def test_the_usage_page_on_comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2", reason="the report was NOT tested: pip install 'awq-ext[report]'")
    pytest.importorskip("matplotlib", reason="the report was NOT tested: pip install 'awq-ext[report]'")
    monkeypatch.chdir(tmp_path)
    known = names()
    known["model"].awq_report = known["quantized"].awq_report  # the snippets above it quantized the model
    (snippet,) = (text for text in snippets("docs/usage.md", "python") if "awq_ext.compare(" in text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(snippet, "docs/usage.md", "exec"), known)
    assert "Heavy tails" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_example_of_why_activations_matter(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = snippets("docs/how-it-works.md", "python")
    exec(compile(snippet, "docs/how-it-works.md", "exec"), {})
    before, after = capsys.readouterr().out.split()
    assert f"It prints {before} and {after}." in (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")


HUB_NAME = "Qwen/Qwen2.5-0.5B-Instruct"


def stand_in(folder: Path) -> Path:
    """What stands for the hub's model: a directory whose widths the default groups of 128 divide."""
    transformers = pytest.importorskip("transformers", reason="the examples were NOT tested: pip install 'awq-ext[hf]'")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder)
    hf_directory.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of transformers, at import; and that windows are few
def test_the_readmes_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python, then by the command; the hub's name is the only thing exchanged."""
    model = stand_in(tmp_path / "model")
    (tmp_path / "my-text.txt").write_text("".join(f"{i} questions and {i * i} answers\n" for i in range(400)))
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets("README.md", "python")
    assert HUB_NAME in snippet
    known: dict[str, Any] = {}
    exec(compile(snippet.replace(HUB_NAME, str(model)), "README.md", "exec"), known)
    assert isinstance(known["model"].get_submodule("model.layers.1.mlp.up_proj"), awq_ext.QuantLinear)
    assert "perplexity" in capsys.readouterr().out
    (command,) = (text for text in snippets("README.md", "") if "awq-ext quantize" in text)
    quantize, serve = command.replace(HUB_NAME, str(model)).replace(" qwen-int4", " again").splitlines()
    shown = CliRunner().invoke(cli.app, shlex.split(quantize)[1:], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert serve in shown.output


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_the_command_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(text for text in snippets("docs/compare.md", "") if "awq-ext compare" in text)
    hf_directory.make(tmp_path / "model")
    for name in ("src.txt", "de.txt"):
        (tmp_path / name).write_text(f"{name}: one line of it\n" * 100)
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "a question"}]}\n' * 100)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli.app, shlex.split(command)[1:], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "awq,clip=false" in shown.output and "code: " in shown.output and "de: " in shown.output
