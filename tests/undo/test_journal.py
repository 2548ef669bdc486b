"""Journal: everything can be taken back, to the bit, also when interrupted in the middle."""

from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch
from checks import Snapshot
from torch import nn

from awq_ext.undo.journal import Journal


def change(journal: Journal, model: nn.Module) -> None:
    journal.set_module(model, "layers.0.up", nn.Linear(1, 1))
    journal.write_tensor(model.layers[1].norm.weight, torch.zeros(models.HIDDEN))
    journal.set_module(model, "layers.0.up", nn.Linear(2, 2))
    journal.write_tensor(model.layers[1].norm.weight, torch.ones(models.HIDDEN))
    journal.set_module(model, "lm_head", nn.Linear(3, 3))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_takes_everything_back(error: type[BaseException]) -> None:
    model = models.Net(models.MlpBlock)
    with torch.no_grad():
        model.layers[1].norm.weight[:3] = torch.tensor([float("nan"), -0.0, 1e-42])
    before = Snapshot(model)
    with pytest.raises(error), Journal() as journal:
        change(journal, model)
        assert model.lm_head.in_features == 3
        raise error
    before.assert_unchanged()


def test_without_an_exception_the_changes_stay() -> None:
    model = models.Net(models.MlpBlock)
    with Journal() as journal:
        change(journal, model)
    assert model.layers[0].up.in_features == 2
    assert torch.equal(model.layers[1].norm.weight, torch.ones(models.HIDDEN))
    assert model.layers[1].norm.weight.requires_grad


def test_a_model_that_was_made_in_inference_mode_is_written_and_taken_back() -> None:
    with torch.inference_mode():
        model = models.Net(models.MlpBlock)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"^mine$"), Journal() as journal:
        change(journal, model)
        assert torch.equal(model.layers[1].norm.weight, torch.ones(models.HIDDEN))
        raise RuntimeError("mine")
    before.assert_unchanged()


def test_rolling_back_twice_is_harmless() -> None:
    model = models.Net(models.MlpBlock)
    before = Snapshot(model)
    journal = Journal()
    change(journal, model)
    journal.rollback()
    journal.rollback()
    before.assert_unchanged()


def test_an_interrupted_rollback_can_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.Net(models.MlpBlock)
    before = Snapshot(model)
    journal = Journal()
    change(journal, model)
    real, broken = torch.Tensor.copy_, [True]

    def copy(*args: object) -> torch.Tensor:
        if broken.pop() if broken else False:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with pytest.raises(KeyboardInterrupt):
        journal.rollback()
    journal.rollback()
    before.assert_unchanged()


def test_a_write_that_fails_halfway_is_taken_back() -> None:
    model = models.Net(models.MlpBlock)
    before = Snapshot(model)
    with pytest.raises(RuntimeError), Journal() as journal:
        journal.write_tensor(model.layers[0].norm.weight, torch.zeros(3))
    before.assert_unchanged()


def test_a_module_that_does_not_exist() -> None:
    model = models.Net(models.MlpBlock)
    before = Snapshot(model)
    with pytest.raises(AttributeError), Journal() as journal:
        journal.set_module(model, "layers.7.up", nn.Linear(1, 1))
    before.assert_unchanged()


def test_attributes() -> None:
    owner = SimpleNamespace(use_cache=True)
    with pytest.raises(RuntimeError), Journal() as journal:
        journal.set_attribute(owner, "use_cache", False)
        assert owner.use_cache is False
        raise RuntimeError
    assert owner.use_cache is True
