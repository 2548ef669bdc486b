"""Twins: a copy with the same matrices that quantize() can work on without the original noticing."""

from __future__ import annotations

import threading

import architectures
import matrix
import models
import pytest
import torch
from checks import Snapshot
from torch import nn

import awq_ext
from awq_ext.evaluation.shared_copy import Twin
from awq_ext.modules import unwrapped

SETTINGS = [
    {},
    {"fold": "always"},
    {"method": "rtn"},
    {"packed": False, "bits": 3},
    {"method": "awq+gptq", "propagate": "quantized"},
]


@pytest.mark.parametrize(("name", "settings"), matrix.product(list(models.MODELS), SETTINGS, together=1), ids=str)
def test_quantizing_a_twin_leaves_the_model_alone(name: str, settings: dict[str, object]) -> None:
    case = models.make(name)
    snapshot = Snapshot(case.model)
    twin = Twin.of(case.model)
    awq_ext.quantize(twin.module, case.batches, group_size=16, n_grid=4, progress=False, **settings)
    twin.check()
    snapshot.assert_unchanged()
    assert any(row.status != "float" for row in twin.module.awq_report.layers)


@pytest.mark.filterwarnings("ignore")  # of transformers, and of experts that see few tokens
@pytest.mark.parametrize("name", architectures.params())
def test_no_architecture_is_written(name: str) -> None:
    """Routers, for one, are multiplied by the scale that the norm before them was divided by."""
    made = architectures.make_or_skip(name)
    snapshot = Snapshot(made.model)
    twin = Twin.of(unwrapped(made.model))
    awq_ext.quantize(twin.module, made.batches, group_size=16, n_grid=3, clip=False, min_tokens=1, progress=False)
    snapshot.assert_unchanged()
    twin.check()


def test_routers_belong_to_the_twin() -> None:
    made = architectures.make("experts in a list")
    twin = Twin.of(made.model)
    own = dict(made.model.named_parameters())
    shared = {name for name, parameter in twin.module.named_parameters() if parameter is own[name]}
    assert shared == {name for name, parameter in own.items() if parameter.dim() == 2 and "gate" not in name}
    awq_ext.quantize(twin.module, made.batches, group_size=16, n_grid=3, min_tokens=1, progress=False)
    assert not torch.equal(twin.module[0].gate.weight, made.model[0].gate.weight)  # the test above tests something


def test_a_twin_computes_what_the_model_does_and_shares_its_matrices(case: models.Case) -> None:
    twin = Twin.of(case.model)
    with torch.no_grad():
        expected = models.logits(case.model(case.batches[0].clone()))
        assert torch.equal(models.logits(twin.module(case.batches[0].clone())), expected)
    own = dict(case.model.named_parameters())
    for name, parameter in twin.module.named_parameters():
        assert (parameter is own[name]) == (parameter.dim() >= 2)


def test_a_write_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    twin = Twin.of(model)
    with torch.no_grad():
        twin.module[0].bias.zero_()  # its own
    twin.check()
    with torch.no_grad():
        twin.module[0].weight.zero_()
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        twin.check()


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(3, 4)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear cannot be copied.*deepcopy"):
        Twin.of(model)
