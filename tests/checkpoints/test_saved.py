"""save and load: every bit comes back, a kill loses nothing, a hostile file changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awq_ext
from awq_ext import CheckpointError

INDEX = "awq_ext.json"


def quantized(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    case = models.make(name, dtype)
    settings: dict[str, Any] = {"group_size": 16, "n_grid": 3, "progress": False} | options
    return awq_ext.quantize(case.model, case.batches, **settings)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same_model(a: nn.Module, b: nn.Module, name: str = "llama") -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert same_bits(tensor, second[key]), key
    assert [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]
    batch = models.make(name).batches[0].to(next(iter(first.values())).dtype if name == "mlp" else torch.long)
    with torch.no_grad():
        assert torch.equal(models.logits(a(batch)), models.logits(b(batch)))


@pytest.mark.parametrize("name", list(models.MODELS))
@pytest.mark.parametrize("meta", [False, True])
def test_reload_is_bit_for_bit(name: str, meta: bool, tmp_path: Path) -> None:
    model = quantized(name)
    assert awq_ext.save(model, tmp_path) == tmp_path
    torch.manual_seed(99)
    with torch.device("meta" if meta else "cpu"):
        empty = models.MODELS[name]().eval()
    loaded = awq_ext.load(empty, tmp_path)
    assert loaded is empty
    assert not any(tensor.is_meta for tensor in tensors_of(loaded).values())
    assert_same_model(model, loaded, name)
    assert loaded.awq_report == model.awq_report
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"scale_dtype": "bfloat16"}, {"symmetric": True, "fold": "never"}])
def test_other_dtypes(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(dtype=dtype, **options)
    awq_ext.save(model, tmp_path)
    loaded = awq_ext.load(lambda: models.Net().eval(), tmp_path)  # built in fp32: takes the dtype of the file
    assert_same_model(model, loaded)
    layer = loaded.layers[0].mlp.up_proj
    assert (layer.dtype, layer.weight.dtype) == (dtype, dtype)


def test_loading_onto_a_quantized_model_replaces_it(tmp_path: Path) -> None:
    model, other = quantized(), quantized(group_size=32, symmetric=True, fold="never")
    awq_ext.save(model, tmp_path)
    assert_same_model(model, awq_ext.load(other, tmp_path))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = quantized("tied")
    awq_ext.save(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert ("embed.weight" in stored) != ("lm_head.weight" in stored)
    with torch.device("meta"):
        empty = models.TiedNet()
    loaded = awq_ext.load(empty, tmp_path)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_buffers_outside_state_dict_are_stored(tmp_path: Path) -> None:
    class Rotary(models.Net):
        def __init__(self) -> None:
            super().__init__(models.MlpBlock)
            self.register_buffer("table", torch.randn(7), persistent=False)
            self.register_buffer("view", torch.randn(8)[::2], persistent=False)

    model = awq_ext.quantize(Rotary(), models.token_batches(), group_size=16, n_grid=2, progress=False)
    awq_ext.save(model, tmp_path)
    assert "table" not in model.state_dict()
    with torch.device("meta"):
        empty = Rotary()
    loaded = awq_ext.load(empty, tmp_path)
    assert torch.equal(loaded.table, model.table)
    assert torch.equal(loaded.view, model.view)
    assert "table" not in loaded.state_dict()


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no QuantLinear"):
        awq_ext.save(models.Net(), tmp_path)
    model = quantized().to("meta")
    with pytest.raises(CheckpointError, match="is on the meta device"):
        awq_ext.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- atomicity ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a kill, nothing catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise at the ``step``-th operation on files, before it is done."""
    count = [0]

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= step:
                raise Killed
            return real(*args, **kwargs)

        return guarded

    monkeypatch.setattr("awq_ext.checkpoints.saved.save_file", guard(save_file))
    monkeypatch.setattr(os, "fsync", guard(os.fsync))
    for name in ("write_text", "replace", "unlink", "rename", "open"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))


def test_a_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """After a kill at each of the file operations in turn the directory loads as the old model or as the new one."""
    old, new = quantized(), quantized(group_size=32, symmetric=True)
    awq_ext.save(old, tmp_path)
    outcomes = []
    for step in range(1, 40):
        awq_ext.save(old, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, step)
            try:
                awq_ext.save(new, tmp_path)
            except Killed:
                killed = True
            else:
                killed = False
        loaded = awq_ext.load(lambda: models.Net().eval(), tmp_path)
        expected = old if loaded.layers[0].mlp.up_proj.group_size == 16 else new
        assert_same_model(loaded, expected)
        outcomes.append(expected is new)
        if not killed:
            break
    assert not killed
    assert outcomes == sorted(outcomes), "once the new checkpoint is in place, no later step goes back"
    assert outcomes[0] is False
    assert outcomes.count(False) >= 4
    assert outcomes[-1] is True
    awq_ext.save(new, tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"], "leftovers are cleared away"


def test_the_first_save_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    model = quantized()
    outcomes = []
    for step in range(1, 40):
        folder = tmp_path / str(step)
        killed = False
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, step)
            try:
                awq_ext.save(model, folder)
            except Killed:
                killed = True
        outcomes.append((folder / INDEX).exists())
        if outcomes[-1]:
            assert_same_model(awq_ext.load(lambda: models.Net().eval(), folder), model)
        else:
            with pytest.raises(CheckpointError, match=f"has no {INDEX}"):
                awq_ext.load(models.Net(), folder)
        if not killed:
            break
    assert not killed
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 4


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        awq_ext.save(quantized(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    assert (tmp_path / "model.safetensors").read_text() == "mine"
