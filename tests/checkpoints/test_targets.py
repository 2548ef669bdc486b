"""Nothing is overwritten unasked: every writer, on every kind of directory that may be there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

import awq_ext
from awq_ext import AwqReport, CheckpointError

KINDS = {
    "float": {"config.json": "{}", "model.safetensors": "float"},
    "float without a config": {"model-00001-of-00002.safetensors": "float"},
    "float, pickled": {"config.json": "{}", "pytorch_model.bin": "float"},
    "quantized": {"config.json": '{"quantization_config": {"quant_method": "awq"}}', "model.safetensors": "int4"},
    "quantized, of AutoGPTQ": {"config.json": "{}", "quantize_config.json": "{}", "model.safetensors": "int4"},
    "no checkpoint": {"tokenizer.json": "{}", "notes.txt": "mine", "adapter_model.safetensors": "mine"},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    case = models.make("mlp")
    return awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)


def convert(to: Path, **options: Any) -> Path:
    source = to.parent / "source"
    if not source.exists():
        awq_ext.save_pretrained(model(), source, "native")
    return awq_ext.convert(source, to, "native", **options)


WRITERS: dict[str, Callable[..., Path]] = {
    "save": lambda to, **options: awq_ext.save(model(), to, **options),
    "save_pretrained": lambda to, **options: awq_ext.save_pretrained(model(), to, "native", **options),
    "convert": convert,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def holds_int4(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("writer", list(WRITERS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_there_stays_unless_it_is_asked_for(kind: str, writer: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name, text in KINDS[kind].items():
        (target / name).write_text(text)
    before, write = contents(target), WRITERS[writer]
    ways: list[Any] = [False, True, str(target)]
    allowed = {"f": 2, "q": 1, "n": 0}[kind[0]]  # float: by name alone
    for way in ways[:allowed]:
        with pytest.raises(
            CheckpointError, match="float weights" if kind[0] == "f" else "a quantized checkpoint"
        ) as error:
            write(target, overwrite=way)
        assert isinstance(error.value, FileExistsError)
        assert contents(target) == before
    write(target, overwrite=ways[allowed])
    assert holds_int4(target)
    if kind == "no checkpoint":
        assert before.items() <= contents(target).items()


@pytest.mark.parametrize("writer", list(WRITERS))
def test_another_directory_does_not_count_as_named(writer: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model.safetensors").write_text("float")
    with pytest.raises(ValueError, match=r"names another directory than"):
        WRITERS[writer](tmp_path / "target", overwrite=tmp_path / "other")
    assert contents(tmp_path / "target") == {"model.safetensors": b"float"}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_name_may_be_written_in_another_way(writer: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model.safetensors").write_text("float")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert holds_int4(WRITERS[writer](tmp_path / "target", overwrite=tmp_path / "x" / ".." / "link"))


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        awq_ext.save(model(), tmp_path / "x", overwrite=True)
    assert (tmp_path / "x").read_text() == "mine"


def test_a_page_is_not_replaced_unasked(tmp_path: Path) -> None:
    page = AwqReport().to_html(tmp_path / "r.html")
    page.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        AwqReport().to_html(page)
    assert page.read_text() == "mine"
    assert AwqReport().to_html(page, overwrite=True).read_text(encoding="utf-8").startswith("<!")
