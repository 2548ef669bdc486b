"""Bias correction: a bias takes over the mean of the error, the search goes by what is left, and nothing else is written."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import architectures
import models
import pytest
import torch
from checks import Snapshot, bits, inputs_of
from torch import Tensor, nn
from torch.nn import functional as F

import awq_ext
from awq_ext.solving.bias import corrected, own_biases
from awq_ext.undo.journal import Journal

# rows count alike, as in the means taken here
FAST: dict[str, Any] = {"group_size": 16, "n_grid": 4, "objective": "layer", "progress": False}
METHODS = pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
EPS = 2.0**-24


class Relu(nn.Module):
    """norm -> up -> ReLU -> down: scales fold into the norm and into ``up``, whose bias is divided then."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(40)
        self.up = nn.Linear(40, 72)
        self.down = nn.Linear(72, 40)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(40).exp())
            self.norm.bias.normal_()
            self.up.bias.uniform_(0, 2)  # so that every unit lets many rows pass
            self.up.weight.mul_(torch.randn(72, 1).exp())
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


def seeded(make: type[nn.Module], *args: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = make(*args)
    return model, [torch.randn(2, t, 40).to(model.norm.weight.dtype) * 2 for t in (50, 90)]


# --- what may be written ---------------------------------------------------------------------------------------


def test_a_bias_takes_over_what_its_dtype_holds() -> None:
    bias = torch.tensor([0.0, 300.0, 65504.0, float("inf"), 1.0], dtype=torch.float16)
    error = torch.tensor([1e-3, 0.01, 100.0, 1.0, -1.0], dtype=torch.float64)
    shift, left = corrected(bias, error)
    assert shift.tolist() == [1e-3, 0.01, 0.0, 0.0, -1.0]
    assert (left.abs() <= error.abs()).all()
    assert left[1] == pytest.approx(0.01), "the next number after 300 is 300.25"
    assert left[2:4].tolist() == [100.0, 1.0]
    assert abs(left[0]) < 1e-6


def test_biases_that_may_be_written() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(4, 4) for name in ("own", "tied", "twin", "viewed", "view", "wide", "late", "part")}
    )
    model["bare"] = nn.Linear(4, 4, bias=False)
    model["twin"].bias = model["tied"].bias
    model["view"].bias = nn.Parameter(model["viewed"].bias.detach())
    model.joined = nn.Parameter(torch.zeros(6))
    model["part"].bias = nn.Parameter(model.joined.detach()[2:])
    model["wide"].bias = nn.Parameter(torch.zeros(1).expand(4))
    with torch.inference_mode():
        model["late"].bias = nn.Parameter(torch.zeros(4))
    assert own_biases(model, model.values()) == {model["own"]}


@METHODS
def test_a_bias_that_something_else_reads_stays(method: str) -> None:
    class Tied(Relu):
        def __init__(self) -> None:
            super().__init__()
            self.offset = self.down.bias

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.offset

    model, batches = seeded(Tied)
    before = bits(model.down.bias)
    report = awq_ext.quantize(model, batches, method=method, **FAST).awq_report
    assert bits(model.down.bias) == before
    assert (report["up"].bias_corrected, report["down"].bias_corrected) == (True, False)
    assert all(row.loss <= row.loss_rtn for row in report.layers)


@pytest.mark.filterwarnings("ignore:.*rounded to nearest instead")
@pytest.mark.parametrize("options", [{"method": "rtn"}, {"bias_correction": False}, {"min_tokens": 10**6}])
def test_biases_stay_where_nothing_is_corrected(options: dict[str, Any]) -> None:
    model = architectures.loud(nn.Sequential(Experts(), Experts()))
    before = {name: bits(p) for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name}
    awq_ext.quantize(model, [torch.randn(3, 40, 24) for _ in range(2)], fold="never", **options, **FAST)
    assert len(before) == 12
    assert {name: bits(p) for name, p in model.named_parameters() if name in before} == before
    assert not any(row.bias_corrected for row in model.awq_report.layers)


def test_one_layer_alone_can_be_left_out() -> None:
    model, batches = seeded(Relu)
    report = awq_ext.quantize(model, batches, per_layer={"up": {"bias_correction": False}}, **FAST).awq_report
    assert (report["up"].bias_corrected, report["down"].bias_corrected) == (False, True)


def test_an_input_that_is_no_number_leaves_its_bias() -> None:
    model, batches = seeded(Relu)
    with torch.no_grad():
        model.up.bias[3] = float("inf")  # what ``down`` reads
    before = bits(model.down.bias)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        awq_ext.quantize(model, batches, **FAST)
    assert bits(model.down.bias) == before
    assert model.up.bias[3] == float("inf")


# --- what is left ----------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_a_constant_input_costs_nothing(method: str, symmetric: bool, packed: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 24))
    row = torch.randn(40)
    expected = model(row)
    batches = [row.expand(2, 50, 40)] * 2
    awq_ext.quantize(model, batches, method=method, symmetric=symmetric, packed=packed, **FAST)
    # a product of 40 terms in fp32 before and after, and the bias rounded to it
    magnitude = row.abs() @ model[0].weight.abs().T + expected.abs()
    assert ((model(row) - expected).abs() <= 100 * EPS * magnitude).all()
    (layer,) = model.awq_report.layers
    assert layer.bias_corrected
    assert 0 <= layer.loss <= 1e-4 * layer.loss_rtn


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_lost_than_without(method: str, dtype: torch.dtype) -> None:
    losses = {}
    for on in (True, False):
        model, batches = seeded(Relu, dtype)
        original = copy.deepcopy(model)
        report = awq_ext.quantize(model, batches, method=method, fold="never", bias_correction=on, **FAST).awq_report
        x = inputs_of(original, batches, [row.name for row in report.layers])
        for row in report.layers:
            old, new = original.get_submodule(row.name), model.get_submodule(row.name)
            direct = x[row.name] @ (new.weight.double() - old.weight.double()).T
            direct = (direct + new.bias.double() - old.bias.double()).detach()
            # bf16: the weight reads back rounded to 2^-9 of itself
            assert row.loss == pytest.approx(
                float(direct.square().sum()) / len(direct), rel=2e-3 if dtype.itemsize > 2 else 0.1
            )
        losses[on] = [row.loss for row in report.layers]
        rtn = [row.loss_rtn for row in report.layers]
        assert all(loss <= most for loss, most in zip(losses[on], rtn, strict=True))
    assert all(less < more for less, more in zip(losses[True], losses[False], strict=True))


@pytest.mark.parametrize("packed", [True, False])
@METHODS
def test_a_bias_is_corrected_before_a_fold_divides_it(
    method: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = {}
    quantizing = importlib.import_module("awq_ext.pipeline.run")
    real = quantizing.build_layer

    def build(layer: Any, fold: Any) -> nn.Module:
        solved[layer.task.name] = layer
        return real(layer, fold)

    monkeypatch.setattr(quantizing, "build_layer", build)
    model, batches = seeded(Relu)
    original = copy.deepcopy(model)
    report = awq_ext.quantize(model, batches, method=method, packed=packed, **FAST).awq_report
    folded = method != "gptq" and packed
    assert (solved["up"].divisor is not None) == folded
    assert (report["down"].applied == "linear") == folded
    rows = inputs_of(original, batches, list(solved))
    for name, layer in solved.items():
        old, new = original.get_submodule(name), model.get_submodule(name)
        divisor = torch.ones(len(new.bias)) if layer.divisor is None else layer.divisor
        scale = layer.scale if layer.scale is not None and packed else 1.0
        restored = (new.weight.detach().double() / scale) * divisor[:, None].double()
        mean = (rows[name] @ (old.weight.double() - restored).T).mean(0)
        expected = (old.bias.double() + mean) / divisor
        assert not torch.allclose(expected, old.bias.double() / divisor, rtol=1e-3)
        torch.testing.assert_close(new.bias.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_bias_too_large_for_its_dtype_is_not_relied_on() -> None:
    """Biases of 300 in bfloat16 move in steps of 2: they hold none of the error, and the search must not leave it to them."""
    losses = {}
    for on in (True, False):
        model, batches = seeded(Relu, torch.bfloat16)
        with torch.no_grad():
            model.up.bias.fill_(300)
        report = awq_ext.quantize(model, batches, method="gptq", bias_correction=on, **FAST).awq_report
        assert (model.up.bias == 300).all()
        losses[on] = report["up"].loss
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert losses[True] <= report["up"].loss_rtn


class Mixed(nn.Module):
    """Linears of one input, with a bias and without."""

    def __init__(self, names: str = "abc") -> None:
        super().__init__()
        made = {n: nn.Linear(40, 30, bias=n != "b") for n in "abc"}
        self.norm = nn.LayerNorm(40)
        self.linears = nn.ModuleDict({n: made[n] for n in names})
        with torch.no_grad():
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([linear(x) for linear in self.linears.values()], -1)


def test_linears_with_and_without_a_bias_share_an_input() -> None:
    """Each is rounded as it is without the others: by the moment around the mean or by the plain one."""
    together, batches = seeded(Mixed)
    awq_ext.quantize(together, batches, method="gptq", **FAST)
    for name in "abc":
        alone, _ = seeded(Mixed, name)
        awq_ext.quantize(alone, batches, method="gptq", **FAST)
        for key, value in alone.linears[name].state_dict().items():
            assert torch.equal(value, together.linears[name].state_dict()[key]), (name, key)
    flags = [row.bias_corrected for row in together.awq_report.layers]
    assert flags == [True, False, True]


class Experts(nn.Module):
    """Two experts with biases behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.gate = nn.Linear(24, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, -2)
        chosen = self.gate(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            picked = chosen == e
            out[picked] = expert(rows[picked])
        return x + out.view_as(x)


@METHODS
def test_experts_with_biases(method: str) -> None:
    torch.manual_seed(0)
    model = architectures.loud(nn.Sequential(Experts(), Experts()))
    original = copy.deepcopy(model)
    batches = [torch.randn(3, 60, 24) for _ in range(2)]
    report = awq_ext.quantize(model, batches, method=method, min_tokens=1, fold="never", **FAST).awq_report
    done = [row for row in report.layers if row.status == "int4"]
    rows = inputs_of(original, batches, [row.name for row in done])
    assert len(done) == 12
    for row in done:
        assert row.bias_corrected
        assert row.loss <= row.loss_rtn
        old, new = original.get_submodule(row.name), model.get_submodule(row.name)
        mean = (rows[row.name] @ (old.weight.double() - new.weight.double()).T).mean(0)
        torch.testing.assert_close(new.bias.double(), old.bias.double() + mean, rtol=1e-5, atol=1e-5)


# --- all or nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["write_tensor", "set_module"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupt_gives_every_bias_back(stage: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("layernorm")
    before = Snapshot(case.model)
    calls = []
    real = getattr(Journal, stage)

    def trapped(*args: Any) -> None:
        real(*args)
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, stage, trapped)
    with pytest.raises(KeyboardInterrupt):
        awq_ext.quantize(case.model, case.batches, **FAST)
    before.assert_unchanged()


class Transposed(nn.Module):
    """A Linear by another name, its weight [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 24))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("interrupted", [True, False])
def test_layers_with_a_transposed_weight(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed())
    batches = [torch.randn(2, 50, 40) + torch.randn(40)]
    expected, before = model(batches[0]).detach(), Snapshot(model)
    if interrupted:
        monkeypatch.setattr(importlib.import_module("awq_ext.pipeline.quantize"), "reasons_to_stay", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            awq_ext.quantize(model, batches, **FAST)
        before.assert_unchanged()
        return
    bias = model[0].bias
    awq_ext.quantize(model, batches, **FAST)
    assert model[0].bias is bias
    error = (model(batches[0]) - expected).flatten(0, -2).double()
    # fp32 sums of 40 products
    assert (error.mean(0).abs() <= 1e-5).all()
    assert (error.square().mean(0) > 1e-3).all()


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, batches = seeded(Relu)
    expected = awq_ext.quantize(model, batches, **FAST)(batches[0])
    awq_ext.save(model, tmp_path / "model")
    loaded = awq_ext.load(lambda: seeded(Relu)[0], tmp_path / "model")
    assert torch.equal(loaded(batches[0]), expected)
