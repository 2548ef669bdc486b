"""Fused experts: taken apart where the first batch proves it, put back to the last object where anything goes wrong."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from checks import Snapshot, bits, same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import awq_ext
from awq_ext.forwards.calls import Call
from awq_ext.standins.expert_linears import ExpertLinears
from awq_ext.standins.fused import find_fused
from awq_ext.standins.unfuse import unfuse
from awq_ext.undo.journal import Journal

SETTINGS = {"group_size": 16, "n_grid": 4, "min_tokens": 1, "progress": False}
COUNT, HIDDEN, INNER = 4, 32, 48


class Fused(nn.Module):
    """Experts in two parameters, used as the subclass says; ``bias`` is a user's own 2-D parameter."""

    transposed = False

    def __init__(self) -> None:
        super().__init__()
        shapes = [(INNER, HIDDEN), (HIDDEN, INNER)]
        shapes = [shape[::-1] for shape in shapes] if self.transposed else shapes
        self.up = nn.Parameter(torch.randn(COUNT, *shapes[0]) / HIDDEN**0.5)
        self.bias = nn.Parameter(torch.randn(COUNT, INNER))
        self.down = nn.Parameter(torch.randn(COUNT, *shapes[1]) / INNER**0.5)

    def expert(self, x: Tensor, e: Any) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up[e]) + self.bias[e]), self.down[e])

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
        mixed = torch.zeros_like(rows)
        for e in range(COUNT):
            token = torch.where(chosen == e)[0]
            if len(token):
                mixed[token] = self.expert(rows[token], e)
        return mixed


class ByTensor(Fused):
    def expert(self, x: Tensor, e: Any) -> Tensor:
        e = torch.tensor(e)
        return F.linear(input=F.relu(F.linear(x, self.up[e], self.bias[e])), weight=self.down[e])


class Multiplied(Fused):
    transposed = True

    def expert(self, x: Tensor, e: Any) -> Tensor:
        return torch.matmul(F.relu(x @ self.up[e] + self.bias[e]), self.down[e].to(x.device, x.dtype))


class Mapped(Fused):
    """Makes something by torch.vmap, as the attention masks of transformers 4.57 are; its tensors have no address."""

    def expert(self, x: Tensor, e: Any) -> Tensor:
        return torch.vmap(lambda row: row * 2)(super().expert(x, e))


class Gathered(Fused):
    def expert(self, x: Tensor, e: Any) -> Tensor:
        matrices = self.up[torch.full((len(x),), e)]
        return F.linear(F.relu(torch.einsum("tnk,tk->tn", matrices, x)), self.down[e])


class Turned(Fused):
    def expert(self, x: Tensor, e: Any) -> Tensor:
        return F.linear(F.relu(x @ self.up[e].T), self.down[e])


class Both(Fused):
    """One parameter, two kinds of use."""

    def expert(self, x: Tensor, e: Any) -> Tensor:
        size = (self.up[e] ** 2).sum()
        return F.linear(F.relu(F.linear(x, self.up[e]) / size), self.down[e])


class Routed(nn.Module):
    """norm -> the expert whose score is highest -> residual."""

    def __init__(self, experts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, COUNT, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, -2)
        return x + self.experts(rows, self.router(rows).argmax(-1)).view(x.shape)


def routed(experts: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return architectures.loud(nn.Sequential(Routed(experts), Routed(experts))).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, 24, HIDDEN).to(dtype) for _ in range(3)]


@torch.no_grad()
def result(model: nn.Module, x: Any) -> Tensor:
    model.eval()
    output = model(**x) if isinstance(x, dict) else model(x)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("experts", "use"), [(Fused, "linear"), (ByTensor, "linear"), (Mapped, "linear"), (Multiplied, "matmul")]
)
def test_taken_apart_the_model_has_the_same_bits(experts: type[Fused], use: str, dtype: torch.dtype) -> None:
    model, (x, *_) = routed(experts, dtype), batches(dtype)
    before, expected = Snapshot(model), result(model, x)
    with Journal() as journal:
        made = unfuse(model, Call((x,)), find_fused(model), journal)
        kept = ["0.experts.up", "1.experts.up"] if experts is Multiplied else None  # .to() is no product
        assert sorted(made.reasons) == (["0.experts.down", "1.experts.down"] if kept else [])
        assert {w.name: w.use for w in made.weights if w.leaf == "up"} == {f"{i}.experts.up": use for i in range(2)}
        now = result(model, x)
        if experts is ByTensor and dtype != torch.float32:  # a bias in the product is added after one more rounding
            assert (now - expected).float().norm() <= 32 * torch.finfo(dtype).eps * expected.float().norm()
        else:
            assert same_bits(now, expected)
        first = model[0].experts.up
        assert isinstance(first, ExpertLinears)
        assert first.shape == before.tensors["0.experts.up"][0].shape
        assert first.dtype == dtype
        linear = next(first.children())
        assert linear.weight.data_ptr() == before.tensors["0.experts.up"][0].data_ptr()
        journal.rollback()
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (Gathered, "several of its matrices are read at once"),
        (Turned, "__get__ uses a part of it"),
        (Both, "__pow__ uses a part of it|pow uses a part of it"),
    ],
)
def test_other_uses_stay_float_and_are_reported(experts: type[Fused], reason: str) -> None:
    model, samples = routed(experts), batches()
    up = model[0].experts.up
    with pytest.warns(UserWarning, match=r"0\.experts\.up and 1 more stay float, \d+\.\d% of all parameters"):
        awq_ext.quantize(model, samples, **SETTINGS)
    assert model[0].experts.up is up
    row = model.awq_report["0.experts.up"]
    assert row.status == "float"
    assert any(part in row.note for part in reason.split("|"))
    assert model.awq_report["0.experts.down.1"].status == "int4"
    assert result(model, samples[0]).isfinite().all()


def test_parameters_that_others_share_or_a_pattern_skips_stay() -> None:
    model = routed(Fused)
    model[1].experts.up = model[0].experts.up
    before = {name: module for name, module in model.named_modules()}
    awq_ext.quantize(model, batches(), skip=("0.experts.down.*",), **SETTINGS)
    report = model.awq_report
    assert report["0.experts.up"].note == "its weight is shared with 1.experts.up"
    assert report["0.experts.down"].note == "skipped by pattern"
    assert {report[f"{i}.router"].note for i in range(2)} == {"router of experts"}
    assert not report.warnings
    assert model[0].experts is before["0.experts"]
    assert isinstance(model[0].experts.down, nn.Parameter)
    assert isinstance(model[1].experts.down, ExpertLinears)


def test_one_skipped_expert_stays_a_linear_without_the_others_memory(tmp_path: Path) -> None:
    model, samples = routed(Fused), batches()
    awq_ext.quantize(model, samples, skip=("0.experts.up.2",), **SETTINGS)
    left = list(model[0].experts.up.children())[2]
    assert type(left) is nn.Linear
    assert left.weight.untyped_storage().nbytes() == left.weight.nbytes
    awq_ext.save(model, tmp_path)
    assert same_bits(result(awq_ext.load(routed(Fused), tmp_path), samples[0]), result(model, samples[0]))


@pytest.mark.parametrize("experts", [Fused, ByTensor, Multiplied])
def test_copies_pickles_and_checkpoints_compute_the_same(experts: type[Fused], tmp_path: Path) -> None:
    model, samples = routed(experts), batches()
    awq_ext.quantize(model, samples, skip=("*.experts.down.*",) if experts is Multiplied else (), **SETTINGS)
    expected = result(model, samples[0])
    assert same_bits(result(copy.deepcopy(model), samples[0]), expected)
    assert same_bits(result(pickle.loads(pickle.dumps(model)), samples[0]), expected)
    awq_ext.save(model, tmp_path)
    fresh = awq_ext.load(routed(experts), tmp_path)
    assert same_bits(result(fresh, samples[0]), expected)
    assert {n: bits(t) for n, t in fresh.state_dict().items()} == {n: bits(t) for n, t in model.state_dict().items()}
    again = awq_ext.load(fresh, tmp_path)  # experts that are apart already
    assert same_bits(result(again, samples[0]), expected)
    with torch.device("meta"):
        skeleton = nn.Sequential(Routed(experts), Routed(experts))
    assert same_bits(result(awq_ext.load(skeleton, tmp_path), samples[0]), expected)


@pytest.mark.parametrize(
    "experts",
    [
        {"0.experts.bias": "linear"},
        {"0.experts.up": "sum"},
        {"2.experts.up": "linear"},
        {"0.experts.up": 3},
        ["up"],
        {},
    ],
)
def test_a_checkpoint_with_other_experts_is_refused(experts: Any, tmp_path: Path) -> None:
    model = routed(Fused)
    awq_ext.quantize(model, batches(), **SETTINGS)
    awq_ext.save(model, tmp_path)
    index = json.loads((tmp_path / "awq_ext.json").read_text())
    (tmp_path / "awq_ext.json").write_text(json.dumps(index | {"experts": experts}))
    fresh = routed(Fused)
    before = Snapshot(fresh)
    with pytest.raises(awq_ext.CheckpointError):
        awq_ext.load(fresh, tmp_path)
    before.assert_unchanged()


def test_an_expert_stands_for_its_weight_in_one_function_only() -> None:
    model = routed(Fused)
    awq_ext.quantize(model, batches(), **SETTINGS)
    experts, x = model[0].experts.up, torch.randn(2, HIDDEN)
    assert same_bits(F.linear(x, experts[1]), next(iter(list(experts.children())[1:]))(x))
    assert experts[-1].shape == (INNER, HIDDEN)
    for wrong in (
        lambda: x @ experts[0],
        lambda: torch.sum(experts[0]),
        lambda: torch.bmm(x[None], experts),
        lambda: torch.sum(experts),
        lambda: experts[1:],
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(IndexError):
        experts[COUNT]


class Interrupting(nn.Module):
    """Raises at the n-th forward of the model."""

    def __init__(self, inner: nn.Module, at: int, error: BaseException) -> None:
        super().__init__()
        self.inner = inner
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).seen = getattr(type(self), "seen", 0) + 1
        if type(self).seen == self.at:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more")])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
def test_after_an_interrupt_everything_is_the_same_object(at: int, error: BaseException) -> None:
    model = routed(Fused).append(nn.Linear(HIDDEN, HIDDEN))  # something to quantize where the experts are refused
    model.append(Interrupting(nn.Identity(), at, error))
    Interrupting.seen = 0
    before = Snapshot(model)
    # forwards: one that watches, one that proves (an error in it refuses the experts), the survey, the batches
    with (
        pytest.raises((KeyboardInterrupt, awq_ext.CalibrationError))
        if (at, type(error)) != (2, RuntimeError)
        else (pytest.warns(UserWarning, match=r"the model's output is not the same: no more"))
    ):
        awq_ext.quantize(model, batches(), propagate="quantized", **SETTINGS)
    if hasattr(model, "awq_report"):
        assert model.awq_report["0.experts.up"].status == "float"
        assert isinstance(model[0].experts.up, nn.Parameter)
    else:
        before.assert_unchanged()


@pytest.mark.parametrize("call", [1, 5, 9, 14])
def test_after_an_interrupt_of_the_swap_everything_is_the_same_object(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed(Fused)
    before, made, real = Snapshot(model), [], Journal.set_module

    def interrupted(self: Journal, root: nn.Module, name: str, module: nn.Module) -> None:
        made.append(name)
        if len(made) == call:
            raise KeyboardInterrupt
        real(self, root, name, module)

    monkeypatch.setattr(Journal, "set_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        awq_ext.quantize(model, batches(), **SETTINGS)
    before.assert_unchanged()


def test_planning_leaves_no_trace() -> None:
    model = routed(Fused)
    before = Snapshot(model)
    plan = awq_ext.plan(model, batches()[0], group_size=16)
    before.assert_unchanged()
    layers = {name for group in plan.groups for name in group.layers}
    assert layers == {f"{i}.experts.{leaf}.{e}" for i in range(2) for leaf in ("up", "down") for e in range(COUNT)}
    assert plan.stays_float == {"0.router": "router of experts", "1.router": "router of experts"}


def test_the_grouped_implementation_is_switched_off_for_the_experts_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: its implementations are not tested")
    case = architectures.make("Mixtral")
    case.model.config._experts_implementation = "grouped_mm"
    before = Snapshot(case.model)
    configs = {name: m.config for name, m in case.model.named_modules() if hasattr(m, "config")}
    awq_ext.plan(case.model, case.batches[0], group_size=16)
    assert all(case.model.get_submodule(name).config is config for name, config in configs.items())
    before.assert_unchanged()
    awq_ext.quantize(case.model, case.batches, **SETTINGS)
    assert "one by one (eager) instead of by grouped_mm" in str(case.model.awq_report)
    experts = "model.layers.1.mlp.experts"
    for name, config in configs.items():
        now = case.model.get_submodule(name).config
        assert (now is config) != name.endswith(".experts")
        assert now.use_cache == config.use_cache
    assert case.model.config._experts_implementation == "grouped_mm"
    expected = result(case.model, case.batches[0])
    case.model.set_experts_implementation("batched_mm")
    assert same_bits(result(case.model, case.batches[0]), expected)
    awq_ext.save(case.model, tmp_path)
    fresh = awq_ext.load(architectures.make("Mixtral").model, tmp_path)
    assert fresh.get_submodule(experts).config._experts_implementation == "eager"
    assert same_bits(result(fresh, case.batches[0]), expected)
