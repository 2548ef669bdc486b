"""The site's guides run as typed, quote messages that exist, and the reference lists the whole public API."""

from __future__ import annotations

import ast
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import hf_directory
import pytest
import torch
import yaml
from not_only_decoders import bert, llava, made, picture_batches, text_batches
from team import free_port
from torch import nn
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli

transformers = pytest.importorskip("transformers", reason="the guides were NOT tested: pip install 'awq-ext[test]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import; and that windows are few
ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
HUB_NAME, HUB_MIXTURE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen1.5-MoE-A2.7B-Chat"
FILES = ("calib.txt", "code.txt", "prose.txt", "train.txt")
CODELESS = {"what-goes-wrong", "reference"}
RUN = sorted({path.stem for path in GUIDES.glob("*.md")} - CODELESS)
LONG = {"hugging-face", "choose-a-method", "calibrate"}  # most of the time that all take


def blocks(page: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (GUIDES / f"{page}.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def stand_in(folder: Path) -> Path:
    """A directory like the hub's, of a model whose widths the default groups of 128 divide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder)
    hf_directory.tokenizer().save_pretrained(folder)
    return folder


def experts(folder: Path) -> Path:
    """The same for the mixture."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    hf_directory.tokenizer().save_pretrained(folder)
    return folder


def known_names(page: str) -> dict[str, Any]:
    """What a page takes for granted: nothing, unless its words say what the names are."""
    if page != "not-only-decoders":
        return {}
    texts = text_batches(count=3)
    names = {"encoder": made(bert), "text_batches": texts[1:], "held_out": texts[0]}
    return names | {"seeing": made(llava), "picture_batches": picture_batches(count=2)}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.exhaustive) if page in LONG else page for page in RUN]
)
def test_the_guide_runs_as_typed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "lora":
        pytest.importorskip("peft", reason="the guide on LoRA was NOT tested: pip install 'awq-ext[test]'")
    folder = stand_in(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a question", "completion": "its answer"}\n' * 200)
    for name in FILES:
        (tmp_path / name).write_text("".join(f"{name}: {i} and {i * i}\n" for i in range(80)))
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)  # as torchrun does for the guide on several machines
    if page == "mixture-of-experts":
        experts(tmp_path / "mixture")
    known, found = known_names(page), blocks(page, "python")
    assert found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in found:
            here = block.replace(HUB_NAME, str(folder)).replace(HUB_MIXTURE, str(tmp_path / "mixture"))
            exec(compile(here, f"{page}.md", "exec"), known)
    reported = [value for value in known.values() if isinstance(value, nn.Module) and hasattr(value, "awq_report")]
    assert reported
    for command in (line for text in blocks(page, "") for line in text.splitlines() if line.startswith("awq-ext ")):
        shown = CliRunner().invoke(cli.app, shlex.split(command)[1:], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output


def texts_of_the_program() -> list[str]:
    """All texts in the package, with … where a value is put in."""
    found = []
    for file in (ROOT / "awq_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_program() -> None:
    page = (GUIDES / "what-goes-wrong.md").read_text("utf-8").split("## No message")[0]
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 10
    texts = texts_of_the_program()
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_the_reference_lists_the_public_names() -> None:
    listed = re.findall(r"^::: awq_ext\.(\w+)$", (GUIDES / "reference.md").read_text("utf-8"), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(awq_ext.__all__)


def test_every_page_is_in_the_sites_menu() -> None:
    """The build says so too, but a plain pytest does not build the site."""
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text("utf-8"))
    menu = re.findall(r"[\w./-]+\.md", str(config["nav"]))
    pages = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(menu) == sorted([*pages, "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md"])
