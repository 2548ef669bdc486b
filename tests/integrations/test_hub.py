"""Models by their names on the Hugging Face hub, from a cache that is laid by hand: no test goes to the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hf_directory
import pytest
import torch
from tiny_transformers import BATCH, float_model, load, logits, registered  # noqa: F401
from torch import nn
from typer.testing import CliRunner

import awq_ext
from awq_ext import CheckpointError, cli
from awq_ext.integrations import hub

pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")
NAME = "some-org/Some-Model-AWQ"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay(cache: Path, folder: Path, name: str = NAME, revision: str = "main", commit: str = COMMIT) -> None:
    """Put a directory into a cache as huggingface_hub does: blobs, a snapshot of links, a revision that names it."""
    home = cache / f"models--{name.replace('/', '--')}"
    for part in ("blobs", f"snapshots/{commit}", "refs"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    for file in folder.iterdir():
        blob = home / "blobs" / f"{commit[:4]}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (home / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / blob.name)


def quantized(**options: object) -> nn.Module:
    settings = {"group_size": 32, "method": "rtn", "fold": "always", "progress": False} | options
    return awq_ext.quantize(float_model(), [BATCH], **settings)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def model(offline: Path, tmp_path: Path) -> nn.Module:
    made = quantized()
    lay(offline, awq_ext.save_pretrained(made, tmp_path / "first"))
    other = quantized(group_size=64)
    lay(offline, awq_ext.save_pretrained(other, tmp_path / "second"), revision="v2", commit=COMMIT[::-1])
    return made


def test_by_name_revision_and_cache(model: nn.Module, offline: Path, tmp_path: Path) -> None:
    loaded = awq_ext.from_pretrained(NAME)
    assert torch.equal(logits(loaded), logits(model)) and loaded.awq_report == model.awq_report
    second = awq_ext.from_pretrained(NAME, revision="v2", token=False)
    assert second.model.layers[0].mlp.up_proj.group_size == 64
    elsewhere = offline.rename(tmp_path / "elsewhere")
    found = awq_ext.from_pretrained(NAME, cache_dir=elsewhere, local_files_only=True)
    assert torch.equal(logits(found), logits(model))
    assert torch.equal(logits(load(NAME, cache_dir=elsewhere)), logits(model))  # AutoModel, registered


def test_a_directory_comes_before_a_name(model: nn.Module, tmp_path: Path) -> None:
    folder = awq_ext.save_pretrained(quantized(group_size=16), tmp_path / NAME)
    assert folder.exists() and awq_ext.from_pretrained(NAME).model.layers[0].mlp.up_proj.group_size == 16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("some-org/Another", {}, "some-org/Another is no directory, is not in the cache .* without a network give a"),
        (NAME, {"revision": "v3"}, "revision v3 is no directory, is not in the cache"),
        ("nowhere", {}, "nowhere is not a directory, nor a name on the Hugging Face hub"),
        ("/no/such/folder", {}, "/no/such/folder is not a directory"),
    ],
)
def test_what_is_not_there_is_one_sentence(name: str, options: dict[str, str], message: str, model: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        awq_ext.from_pretrained(name, **options)
    assert "\n" not in str(caught.value)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="huggingface_hub is needed: pip install"):
        awq_ext.from_pretrained(NAME)


def test_pickles_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.folder_of(NAME, "v2", "secret", tmp_path) == tmp_path
    assert (asked["name"], asked["revision"], asked["token"], asked["cache_dir"]) == (NAME, "v2", "secret", tmp_path)
    assert {"*.bin", "*.pt", "*.pth"} <= set(asked["ignore_patterns"])


def test_code_beside_a_model_is_run_only_when_asked(model: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        awq_ext.from_pretrained(folder)
    with pytest.raises(SystemExit, match="code was run"):
        awq_ext.from_pretrained(folder, trust_remote_code=True)
    shown = run("eval", folder, "calib.txt")
    assert shown.exit_code == 1 and "code was run" not in shown.output


def run(*arguments: object):
    Path("calib.txt").write_text("some text, again and again. " * 40)
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_commands(offline: Path, tmp_path: Path) -> None:
    lay(offline, hf_directory.make(tmp_path / "float"), "some-org/Float")
    options = ["--samples", 2, "--seq-len", 64, "--group-size", 32, "--method", "rtn"]
    shown = run("quantize", "some-org/Float@main", "int4", "--calib", "calib.txt", *options)
    assert shown.exit_code == 0, shown.output
    assert "base_model: some-org/Float" in Path("int4/README.md").read_text()
    lay(offline, Path("int4"))
    for arguments in (
        ("inspect", NAME),
        ("eval", NAME, "calib.txt", "--reference", "some-org/Float", "--seq-len", 64),
        ("convert", NAME, "ct", "--format", "compressed-tensors"),
    ):
        shown = run(*arguments)
        assert shown.exit_code == 0, shown.output
    shown = run("inspect", "some-org/Nothing")
    assert shown.exit_code == 1 and len(shown.output.strip().splitlines()) == 1
    shown = run("inspect", "nothing")
    assert shown.exit_code == 2 and "does not exist" in shown.output


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
@pytest.mark.parametrize("command", ["quantize", "compare", "eval", "inspect", "convert"])
def test_commands_pass_revision_and_token_on(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["token"]))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    calib = ["--calib", "calib.txt"]
    more = {
        "quantize": ["out", *calib],
        "compare": [*calib, "--traffic", "calib.txt"],
        "eval": ["calib.txt"],
        "convert": ["out"],
    }
    arguments = [*more.get(command, []), "--revision", "v2", "--token", "secret"]
    for name in (NAME, f"{NAME}@v2"):
        shown = run(command, name, *arguments)
        assert shown.exit_code == 1 and "cannot be downloaded" in shown.output and "secret" not in shown.output
    assert asked == [(NAME, "v2", "secret")] * 2
    shown = run(command, f"{NAME}@v1", *arguments)
    assert shown.exit_code == 2 and "names another" in shown.output
    (tmp_path / "there").mkdir()
    shown = run(command, tmp_path / "there", *arguments)
    assert shown.exit_code == 2 and "no revisions" in shown.output
    assert len(asked) == 2
