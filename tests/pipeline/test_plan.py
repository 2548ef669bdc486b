"""plan(): the table before the work says what the work then does, and changes nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import architectures
import models
import pytest
import torch
from checks import Snapshot
from torch import nn

import awq_ext
from awq_ext import CalibrationError, Plan

FAST: dict[str, Any] = {"n_grid": 3, "group_size": 16, "min_tokens": 1}


def planned(name: str, **settings: Any) -> Plan:
    case = architectures.make_or_skip(name)
    before = Snapshot(case.model)
    common = {key: value for key, value in architectures.SETTINGS.items() if key != "progress"}
    plan = awq_ext.plan(case.model, case.batches[0], batches=len(case.batches), **common, **settings)
    before.assert_unchanged()
    return plan


@pytest.mark.parametrize("fold", ["auto", "always", "never"])
@pytest.mark.parametrize("name", architectures.params())
def test_the_plan_is_what_is_done(name: str, fold: str) -> None:
    plan, model = planned(name, fold=fold), architectures.quantized(name, fold).model
    report = model.awq_report
    rows = {row.name: row for row in report.layers}
    for group in plan.groups:
        members = [rows.pop(layer) for layer in group.layers]
        assert {row.group for row in members} == {group.layers[0]}
        assert {row.in_features for row in members} == {group.in_features}
        assert sum(row.in_features * row.out_features for row in members) == group.weights
        # the identity may turn out to be best, or a fold may be given up: its producer, or some experts, are better off
        given_up = {"run time"} if group.fold in ("norm", "linear") and fold == "auto" else set()
        assert {row.applied for row in members} <= {group.fold, ""} | given_up
        assert {(row.method, row.bits, row.group_size) for row in members} == {("awq", 4, 16)}
        assert bool(group.producer) == (group.fold in ("norm", "linear"))
        model.get_submodule(group.producer)
    assert {name: row.note for name, row in rows.items()} == plan.stays_float
    assert all(row.status == "float" for row in rows.values())
    assert plan.share_quantized == pytest.approx(report.share_quantized)


def test_the_planned_memory_is_that_of_the_calibration() -> None:
    one, four = (
        awq_ext.plan(models.make("llama").model, torch.zeros(2, 24, dtype=torch.long), batches=n, **FAST)
        for n in (1, 4)
    )
    hidden = 2 * 24 * models.HIDDEN * 4
    assert four.planned_memory_bytes - one.planned_memory_bytes == 3 * hidden


def test_settings_by_layer_are_shown() -> None:
    case = models.make("llama")
    fields = {"*.k_proj": {"group_size": 32}, "*.mlp.*": {"bits": 3, "packed": False}, "*.o_proj": {"method": "rtn"}}
    plan = awq_ext.plan(case.model, case.batches[0], per_layer=fields, skip=("lm_head", "layers.2.*"), **FAST)
    qkv, o, gate, down = plan.groups[:4]
    assert (qkv.bits, qkv.group_size, qkv.fold, qkv.producer) == (
        (4, 4, 4),
        (16, 32, 16),
        "norm",
        "layers.0.input_norm",
    )
    assert (o.method, o.fold) == ("rtn", "")
    assert (gate.bits, gate.fold, down.fold) == ((3, 3), "weights", "weights")
    text = str(plan)
    assert "norm input_norm" in text
    assert "16/32" in text
    assert re.search(r"^layers\.2\.mlp\.up_proj +skipped by pattern$", text, re.MULTILINE)
    assert f"{plan.share_quantized:.1%} of all parameters" in text
    assert json.loads(json.dumps(plan.to_dict()))["groups"][0]["layers"] == list(qkv.layers)


def test_without_blocks() -> None:
    case = models.make("llama")
    plan = awq_ext.plan(case.model, case.batches[0], blocks=[], **FAST)
    assert {group.block for group in plan.groups} == {""}
    assert "(whole model)" in str(plan)


def test_texts_are_planned_too() -> None:
    case = models.make("llama")
    plan = awq_ext.plan(
        case.model, "abcdefgh" * 8, tokenizer=lambda text: {"input_ids": [ord(c) % models.VOCAB for c in text]}, **FAST
    )
    assert len(plan.groups) == 12


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": 0}, ValueError, "batches=0"),
        ({"batches": True}, ValueError, "batches=True"),
        ({"config": [4]}, TypeError, "config is a list"),
        ({"blocks": ["nowhere"]}, ValueError, "no module 'nowhere'"),
        ({"per_layer": {"nothing": {}}}, ValueError, "fits none"),
        ({"group_size": 7}, ValueError, "AwqConfig.group_size=7"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    case = models.make("llama")
    before = Snapshot(case.model)
    with pytest.raises(error, match=words):
        awq_ext.plan(case.model, case.batches[0], **change)
    before.assert_unchanged()


def test_a_batch_that_the_model_rejects() -> None:
    case = models.make("llama")
    before = Snapshot(case.model)
    with pytest.raises(CalibrationError, match="rejected calibration batch 0"):
        awq_ext.plan(case.model, torch.full((1, 4), 10**6))
    with pytest.raises(ValueError, match="nothing to quantize"):
        awq_ext.plan(nn.Sequential(nn.ReLU()), torch.zeros(2))
    before.assert_unchanged()


def test_a_group_that_is_longer_than_a_row_is_shown_as_the_row() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    for size, first, second in (
        (128, "64 (whole row)", "128"),
        (-1, "64 (whole row)", "128 (whole row)"),
        (64, "64", "64"),
    ):
        lines = str(awq_ext.plan(model, torch.randn(4, 64), blocks=["0", "2"], group_size=size)).splitlines()
        shown = [re.split(r"\s{2,}", line.strip()) for line in lines[:4]]
        column = shown[0].index("group")
        assert [row[column] for row in shown if row[0] in ("0", "2")] == [first, second]
