"""The card of a quantized model: whose it is, what it takes over from the float model's, and what it says of scores."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_transformers import BATCH, float_model, load, logits, registered  # noqa: F401

import awq_ext
from awq_ext.reporting.model_card import MARK

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")
huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub NOT TESTED: pip install awq-ext[hf]")

FLOAT_CARD = """---
license: other
license_name: some-license
license_link: LICENSE
language:
  - en
  - de
tags: [pytorch, "float"]
pipeline_tag: text-generation
base_model: some-org/Older
model-index:
- name: Some-Model
  results: [{task: {type: text-generation}}]
---
# Some Model

The best one: 99 % on everything.
"""
SAVERS = [
    awq_ext.save_pretrained,
    lambda model, folder: model.save_pretrained(folder),
]


def quantized(model: Any) -> Any:
    return awq_ext.quantize(model, [BATCH], group_size=32, method="rtn", fold="always", progress=False)


def card(folder: Path) -> Any:
    """As the hub reads it."""
    return huggingface_hub.ModelCard.load(folder / "README.md")


def cached(tmp_path: Path, text: str = FLOAT_CARD) -> Path:
    """A float model with a card where huggingface_hub puts what it downloads."""
    folder = tmp_path / "models--some-org--Some-Model" / "snapshots" / "0123"
    float_model().save_pretrained(folder)
    (folder / "README.md").write_text(text)
    return folder


@pytest.mark.parametrize("save", SAVERS)
def test_the_float_models_card_is_not_that_of_the_quantized_one(
    save: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    save(quantized(load(cached(tmp_path))), tmp_path / "int4")
    found = card(tmp_path / "int4")
    assert MARK in found.content and "99 %" not in found.content
    assert (tmp_path / "int4" / "README.base.md").read_text() == FLOAT_CARD
    assert "[README.base.md](README.base.md)" in found.content
    header = found.data.to_dict()
    assert header == {
        "library_name": "transformers",
        "tags": ["awq", "int4", "awq_ext"],
        "base_model": "some-org/Some-Model",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "some-license",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }
    # of one that was quantized already the card is the heir
    save(awq_ext.from_pretrained(tmp_path / "int4"), tmp_path / "again")
    awq_ext.convert(tmp_path / "int4", tmp_path / "converted", format="native")
    for name in ("again", "converted"):
        assert card(tmp_path / name).data.to_dict() == header
        assert "| base model | some-org/Some-Model |" in card(tmp_path / name).content
    assert "format `native`" in card(tmp_path / "converted").content


@pytest.mark.parametrize("text", ["mine", "---\nlicense: [\n---\nbroken", "", MARK])
def test_cards_of_any_kind(text: str, tmp_path: Path) -> None:
    awq_ext.save_pretrained(quantized(load(cached(tmp_path, text))), tmp_path / "int4")
    assert "groups of 32" in card(tmp_path / "int4").content
    assert (tmp_path / "int4" / "README.base.md").exists() == (text not in ("", MARK))


def test_what_a_person_wrote_of_a_quantized_model_stays(tmp_path: Path) -> None:
    awq_ext.save_pretrained(quantized(float_model()), tmp_path / "int4")
    (tmp_path / "int4" / "README.md").write_text("mine")
    model = awq_ext.from_pretrained(tmp_path / "int4")
    awq_ext.save_pretrained(model, tmp_path / "again", format="compressed-tensors")
    assert (tmp_path / "again" / "README.md").read_text() == "mine"
    assert not (tmp_path / "again" / "README.base.md").exists()


def test_scores_stand_in_card_and_report(tmp_path: Path) -> None:
    reference = load(cached(tmp_path))
    model = quantized(load(cached(tmp_path)))
    windows = [torch.randint(96, (2, 16)) for _ in range(3)]
    found = {"code": awq_ext.evaluate(model, windows, reference=reference), "a|b": awq_ext.evaluate(model, windows)}
    awq_ext.save_pretrained(model, tmp_path / "none")
    content = card(tmp_path / "none").content
    assert "KL" not in content
    assert "`awq-ext eval DIRECTORY TEXT.txt --reference some-org/Some-Model --card`" in content
    awq_ext.save_pretrained(model, tmp_path / "int4", evaluations=found)
    assert model.awq_report.evaluations == {}  # saving leaves the model as it is
    kl = found["code"]["kl"]
    said = (
        f"| scores on code | KL divergence {kl.value:.4g} ({kl.low:.4g} to {kl.high:.4g}) nats a token; same likeliest"
    )
    awq_ext.convert(tmp_path / "int4", tmp_path / "converted", format="native")
    loaded = awq_ext.from_pretrained(tmp_path / "int4")
    loaded.save_pretrained(tmp_path / "again")
    for name in ("int4", "converted", "again"):
        content = card(tmp_path / name).content
        assert said in content and "| scores on a/b | perplexity " in content and "not measured" not in content
        report = json.loads((tmp_path / name / "awq_report.json").read_text())
        assert report["evaluations"]["code"] == found["code"].to_dict()
    for wrong in (found["code"], {"code": 3}, {"code": {}}):
        with pytest.raises(TypeError, match="evaluations by the name of their text are needed"):
            awq_ext.save_pretrained(model, tmp_path / "wrong", evaluations=wrong)
    assert not (tmp_path / "wrong").exists()


def test_the_command_of_a_card_makes_the_same_model_again(tmp_path: Path) -> None:
    def tokenizer(text: str) -> list[int]:
        return [ord(letter) % 96 for letter in text[:320]]

    settings = {"group_size": 32, "fold": "always", "seq_len": 32, "progress": False}
    original = float_model()
    model = awq_ext.quantize(copy.deepcopy(original), [BATCH], effort="fast", tokenizer=tokenizer, **settings)
    awq_ext.save_pretrained(model, tmp_path / "int4")
    content = card(tmp_path / "int4").content
    assert "| calibrated on | 32 tokens given, 320 built-in |" in content
    command = re.search(r"^\| command \| `(.+)` \|$", content, re.MULTILINE)[1]
    assert command.startswith("awq_ext.quantize(model, calibration, tokenizer=tokenizer, effort='fast', ")
    again = eval(command, {"awq_ext": awq_ext, "model": original, "calibration": [BATCH], "tokenizer": tokenizer})
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


class Hub:
    """A repository that takes uploads; all else is huggingface_hub's own, without a network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, []
        api = huggingface_hub.HfApi
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.with_name("cache")))
        monkeypatch.setattr(api, "create_repo", lambda _, name, **options: SimpleNamespace(repo_id=f"me/{name}"))
        monkeypatch.setattr(api, "create_branch", lambda _, name, **options: self.asked.append(options["branch"]))
        monkeypatch.setattr(api, "upload_folder", self.upload_folder)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.asked.append((repo_id, options["commit_message"], options["revision"]))
        shutil.copytree(folder_path, self.folder)
        return "committed"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def by_push(model: Any, folder: Path) -> None:
    assert model.push_to_hub("int4", tags=["mine"], commit_message="pushed", revision="v2") == "committed"


def by_save(model: Any, folder: Path) -> None:
    model.model_tags = ["mine"]
    model.save_pretrained(folder / "int4", push_to_hub=True, commit_message="pushed", revision="v2")
    assert (folder / "int4" / "model.safetensors").exists()


@pytest.mark.parametrize("push", [by_push, by_save])
@pytest.mark.parametrize("origin", ["quantized", "loaded", "auto"])
def test_a_push_has_our_card(origin: str, push: Callable[[Any, Path], None], hub: Hub, tmp_path: Path) -> None:
    model = quantized(load(cached(tmp_path)))
    if origin != "quantized":
        awq_ext.save_pretrained(model, tmp_path / "first")
        model = {"loaded": awq_ext.from_pretrained, "auto": load}[origin](tmp_path / "first")
    push(model, tmp_path)
    assert hub.asked == ["v2", ("me/int4", "pushed", "v2")]
    found = card(hub.folder)
    assert MARK in found.content and "groups of 32" in found.content
    assert found.data.tags == ["awq", "int4", "awq_ext", "mine"] and found.data.base_model == "some-org/Some-Model"
    assert torch.equal(logits(awq_ext.from_pretrained(hub.folder)), logits(model))


@pytest.mark.parametrize("text", ["---\ntags: [old]\n---\nmine", f"---\ntags: [old]\n---\n{MARK}"])
def test_a_card_on_the_hub_stays_if_a_person_wrote_it(
    text: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = huggingface_hub.ModelCard(text)
    kept, load_card = MARK not in text, huggingface_hub.ModelCard.load
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "load", lambda name, **o: there if name == "me/int4" else load_card(name, **o)
    )
    quantized(float_model()).push_to_hub("int4", tags="new")
    found = load_card(hub.folder / "README.md")
    assert ("mine" in found.content, "groups of 32" in found.content) == (kept, not kept)
    assert found.data.tags == (["old", "new"] if kept else ["awq", "int4", "awq_ext", "new"])


def test_what_cannot_be_saved_makes_no_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("a repository was made"))
    model = awq_ext.quantize(float_model(), [BATCH], group_size=32, n_grid=2, fold="never", progress=False)
    with pytest.raises(awq_ext.CheckpointError, match="scaled at run time"):
        model.push_to_hub("int4")
