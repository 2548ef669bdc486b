"""quantize() from end to end, on every kind of model and with every setting."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import matrix
import models
import pytest
import torch
from checks import hook_count, inputs_of, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import awq_ext
from awq_ext import _C, AwqReport, QuantLinear
from awq_ext.kernels import reference

FAST: dict[str, Any] = {"n_grid": 5, "progress": False}


def assert_never_worse(report: AwqReport) -> None:
    measured = [row for row in report.layers if row.status != "float"]
    assert measured
    for row in measured:
        assert row.loss is not None, row
        assert row.loss_rtn is not None, row
        assert 0 <= row.loss <= row.loss_rtn, row


@pytest.mark.parametrize(
    ("name", "method", "propagate"),
    matrix.product(list(models.MODELS), ["awq", "rtn", "awq+gptq"], ["float", "quantized"]),
)
def test_every_model(name: str, method: str, propagate: str) -> None:
    case = models.make(name)
    model, batches = case.model, case.batches
    original = copy.deepcopy(model)
    linears = {n: m for n, m in original.named_modules() if isinstance(m, nn.Linear)}
    result = awq_ext.quantize(model, batches, method=method, propagate=propagate, group_size=16, **FAST)
    assert result is model
    assert hook_count(model) == 0
    report = model.awq_report
    assert_never_worse(report)
    assert report.warnings == []
    assert sorted(row.name for row in report.layers) == sorted(linears)
    for row in report.layers:
        module = model.get_submodule(row.name)
        left = "unused" in row.name or row.name == "lm_head"
        assert row.status == ("float" if left else "int4")
        assert type(module) is (nn.Linear if left else QuantLinear)
        if left:
            assert same_bits(module.weight, original.get_submodule(row.name).weight)
        elif method == "rtn":
            assert (row.scale, row.clipped, row.loss) == ("identity", False, row.loss_rtn)
    if method == "awq":
        assert any(row.loss < row.loss_rtn for row in report.layers if row.loss is not None)
    with torch.no_grad():
        found = [models.logits(model(batch)) for batch in batches]
        wanted = [models.logits(original(batch)) for batch in batches]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        # int4 rounds each weight by some percent of its group's range; a wrong fold or code is off by the output itself
        assert 0 < (a - b).norm() < 0.35 * b.norm()


@pytest.mark.parametrize(
    ("dtype", "options", "symmetric", "group_size"),
    matrix.product(
        [torch.float32, torch.bfloat16],
        [{}, {"scale_dtype": "bfloat16", "clip": True}, {"bits": 3, "packed": False}],
        [False, True],
        [-1, 16, 32, 64],
    ),
)
def test_every_setting(dtype: torch.dtype, options: dict[str, Any], symmetric: bool, group_size: int) -> None:
    case = models.make("llama", dtype)
    float_logits = [case.model(batch).detach() for batch in case.batches]
    awq_ext.quantize(case.model, case.batches, group_size=group_size, symmetric=symmetric, **options, **FAST)
    report = case.model.awq_report
    assert_never_worse(report)
    bits = options.get("bits", 4)
    for row in report.layers[:-1]:
        module = case.model.get_submodule(row.name)
        if bits == 3:
            assert type(module) is nn.Linear
            assert row.status == "fake"
            assert row.applied in ("", "weights")
            continue
        assert module.group_size == group_size
        assert module.scales.dtype == (torch.bfloat16 if "scale_dtype" in options else torch.float16)
        if symmetric and not (module.zeros == 8).all():
            raise AssertionError(f"{row.name} is not symmetric")
    for batch, wanted in zip(case.batches, float_logits, strict=True):
        found = case.model(batch)
        assert found.dtype == dtype
        assert (found - wanted).norm() < 0.6 * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "mlp", "twice", "modes", "shared_block"])
@pytest.mark.parametrize("packed", [True, False])
def test_reported_losses_are_the_real_ones(name: str, packed: bool) -> None:
    """Against the squared output error of the finished layers on the float model's inputs, computed from those."""
    case = models.make(name)
    original = copy.deepcopy(case.model)
    awq_ext.quantize(case.model, case.batches, group_size=16, fold="never", packed=packed, **FAST)
    rows = [row for row in case.model.awq_report.layers if row.status != "float"]
    inputs = inputs_of(original, case.batches, [row.name for row in rows])
    for row in rows:
        x = inputs[row.name]
        old, new = original.get_submodule(row.name), case.model.get_submodule(row.name)
        weight, restored = old.weight.detach().double(), new.weight.detach().double()
        moved = 0.0 if old.bias is None else (new.bias - old.bias).detach().double()
        assert row.bias_corrected == (old.bias is not None)
        direct = float((x @ (restored - weight).T + moved).square().sum()) / len(x)
        rtn = reference.quantize_weight(weight.float(), 16)
        nearest = reference.dequantize_weight(*rtn, 16).double()
        direct_rtn = float((x @ (nearest - weight).T).square().sum()) / len(x)
        # second moments of up to 500 rows and products over 72 channels in fp32, seen through cancellation in e G e^T
        assert row.loss == pytest.approx(direct, rel=2e-3)
        assert row.loss_rtn == pytest.approx(direct_rtn, rel=2e-3)
        assert row.tokens == len(x)


def test_folded_layers_compute_what_was_promised() -> None:
    """norm' -> int4 against norm -> float on the float model's states: the reported loss, fold included."""
    case = models.make("layernorm")
    original = copy.deepcopy(case.model)
    awq_ext.quantize(case.model, case.batches, group_size=16, **FAST)
    for i in range(3):
        row = case.model.awq_report[f"layers.{i}.up"]
        assert row.applied == "norm"
        states = inputs_of(original, case.batches, [f"layers.{i}.norm"])[f"layers.{i}.norm"].float()
        old, new = original.layers[i], case.model.layers[i]
        with torch.no_grad():
            error = new.up(new.norm(states)) - old.up(old.norm(states))
        assert row.loss == pytest.approx(float(error.double().square().sum()) / len(states), rel=2e-3)


@pytest.mark.parametrize("name", ["llama", "mlp", "twice", "modes"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_backend_does_the_same(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on other devices: the same choices, nearly the same codes. Also where the caller has autocast on."""

    def run() -> nn.Module:
        case = models.make(name)
        with torch.autocast("cpu", enabled=autocast):
            return awq_ext.quantize(case.model, case.batches, group_size=16, **FAST)

    compiled = run()
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a compiled kernel ran")

    for kernel in ("quantize_weight", "scale_losses", "search_clip", "quadratic_loss", "ActivationStats"):
        monkeypatch.setattr(_C, kernel, refuse)
    plain = run()
    for a, b in zip(compiled.awq_report.layers, plain.awq_report.layers, strict=True):
        assert (a.name, a.status, a.scale, a.alpha, a.applied) == (b.name, b.status, b.scale, b.alpha, b.applied)
        if a.loss is None:
            continue
        # fp32 sums in another order; a product in bf16 anywhere would show as 2^-9
        assert a.loss_rtn == pytest.approx(b.loss_rtn, rel=1e-4)
        ours, theirs = compiled.get_submodule(a.name), plain.get_submodule(a.name)
        if a.clipped == b.clipped:
            # statistics differ in their last bits, which moves a code where w / scale is near a half
            same = _C.unpack_int4(ours.qweight, ours.in_features) == _C.unpack_int4(theirs.qweight, ours.in_features)
            assert same.float().mean() > 0.97
            assert a.loss == pytest.approx(b.loss, rel=0.05)


@pytest.mark.parametrize("name", ["twice", "mlp"])
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    """Of models whose own forward does not depend on it; torch's attention does, in the last bit."""
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        case = models.make(name)
        awq_ext.quantize(case.model, case.batches, group_size=16, **FAST)
        states.append(case.model.state_dict())
    for key, tensor in states[0].items():
        assert same_bits(tensor, states[1][key]), key


def test_the_same_call_gives_the_same_model() -> None:
    first, second = models.make("llama"), models.make("llama")
    for case in (first, second):
        awq_ext.quantize(case.model, case.batches, group_size=16, **FAST)
    assert all(same_bits(t, second.model.state_dict()[k]) for k, t in first.model.state_dict().items())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    group_size=st.sampled_from([-1, 16, 32, 128]),
    symmetric=st.booleans(),
    bias=st.booleans(),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_mlp(
    widths: list[int], group_size: int, symmetric: bool, bias: bool, rows: int, dtype: torch.dtype
) -> None:
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(widths):
        layers += [nn.Linear(k, n, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers).to(dtype)
    batches = [torch.randn(rows, widths[0]).to(dtype) for _ in range(2)]
    awq_ext.quantize(model, batches, group_size=group_size, symmetric=symmetric, **FAST)
    assert_never_worse(model.awq_report)
    assert torch.isfinite(model(batches[0])).all()
    assert [type(m) for m in model[::2]] == [QuantLinear] * (len(widths) - 1)


def test_folding_for_formats_that_cannot_hold_the_groups_is_told_before_the_work() -> None:
    model = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    before = copy.deepcopy(model.state_dict())
    says = r"^groups of 64 do not divide the 96 inputs of 1, which formats .*: group_size=32 divides all widths$"
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=says):
        warnings.simplefilter("error")
        awq_ext.quantize(model, [torch.randn(50, 96)], group_size=64, fold="always", **FAST)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    awq_ext.quantize(copy.deepcopy(model), [torch.randn(50, 96)], group_size=64, fold="never", **FAST)
    awq_ext.quantize(model, [torch.randn(50, 96)], group_size=32, fold="always", **FAST)
    assert not model.awq_report.warnings
