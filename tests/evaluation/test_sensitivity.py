"""sensitivity(): each layer alone, by hand too, and choices under a budget."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import architectures
import models
import pytest
import torch
from checks import Snapshot
from torch.nn import functional as F

import awq_ext
from awq_ext import AwqConfig, Bootstrap, CalibrationError, Estimate
from awq_ext.evaluation.sensitivity import Part, Sensitivity, sensitivity
from awq_ext.reporting.sizes import stored_bits

QUICK = {"progress": False, "group_size": 16, "n_grid": 3, "bootstrap": Bootstrap(resamples=100)}


def test_the_cost_of_one_layer_is_that_of_the_formula() -> None:
    case = models.make("llama")
    found = sensitivity(case.model, case.batches, samples=2, **QUICK)
    assert found.measure == "kl" and len(found.parts) == 21
    quantized = copy.deepcopy(case.model)
    awq_ext.quantize(quantized, case.batches, group_size=16, n_grid=3, fold="never", progress=False)
    name = "layers.1.mlp.down_proj"
    trial = copy.deepcopy(case.model)
    trial.set_submodule(name, quantized.get_submodule(name))
    divergences = []
    with torch.no_grad():
        for ids in case.batches[:2]:
            p, q = (model(ids).double().log_softmax(-1) for model in (case.model, trial))
            divergences.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).flatten())
        everything = torch.cat(divergences)
    assert found[name].cost.value == pytest.approx(float(everything.mean()), rel=1e-3)
    assert found[name].cost.low <= found[name].cost.value <= found[name].cost.high
    assert found[name].weights == 40 * 72 and found[name].float_bits == 32 and found[name].rows == 40


def test_small_errors_add_up() -> None:
    case = models.make("llama")
    found = sensitivity(case.model, case.batches, **QUICK)
    assert found.total == pytest.approx(found.together, rel=0.5)


def test_a_model_without_tokens_is_measured_by_its_output() -> None:
    case = models.make("mlp")
    found = sensitivity(case.model, case.batches, method="rtn", **QUICK)
    assert found.measure == "output" and [part.name for part in found.parts] == [
        f"{i}.{j}" for i in range(3) for j in (0, 2)
    ]
    trial = copy.deepcopy(case.model)
    quantized = awq_ext.quantize(copy.deepcopy(case.model), case.batches, method="rtn", group_size=16, progress=False)
    trial[0][2] = quantized[0][2]
    with torch.no_grad():
        error = sum(float((trial(x) - case.model(x)).double().square().sum()) for x in case.batches)
        size = sum(float(case.model(x).double().square().sum()) for x in case.batches)
    assert found["0.2"].cost.value == pytest.approx(error / size, rel=1e-4)


def test_by_block() -> None:
    case = models.make("llama")
    found = sensitivity(case.model, case.batches, by="block", method="rtn", **QUICK)
    assert [part.name for part in found.parts] == ["layers.0", "layers.1", "layers.2"]
    assert all(len(part.layers) == 7 for part in found.parts)
    assert found["layers.1.mlp.up_proj"].name == "layers.1"
    whole = models.make("shared_block")
    one = sensitivity(whole.model, whole.batches, by="block", method="rtn", **QUICK)
    assert [part.name for part in one.parts] == ["(whole model)"]
    assert one.parts[0].cost.value == pytest.approx(one.together)


def test_the_model_is_left_as_it_was(case: models.Case) -> None:
    snapshot = Snapshot(case.model)
    sensitivity(case.model, case.batches, by="block", samples=1, **QUICK)
    snapshot.assert_unchanged()
    with pytest.raises(CalibrationError):
        sensitivity(case.model, [case.batches[0], torch.zeros(1, 2, 3, 4)], **QUICK)
    snapshot.assert_unchanged()


def made(costs: list[float], weights: list[int], bits: float = 4.0, **config: object) -> Sensitivity:
    parts = [
        Part(f"layer{i}", (f"layer{i}",), count, bits, 16, Estimate(cost, cost, cost))
        for i, (cost, count) in enumerate(zip(costs, weights, strict=True))
    ]
    return Sensitivity(parts, "kl", sum(costs), AwqConfig(**config))


def test_the_budget_goes_where_it_saves_most() -> None:
    found = made([1.0, 9.0, 4.0, 0.5], [100, 100, 100, 100])
    kept = found.keep(bits=7.0)  # 3 bits a weight to spend: one of four layers at 16 bits
    assert kept.names == ("layer1",) and kept.bits == 7.0
    assert kept.cost == pytest.approx(5.5) and kept.cost_before == 14.5
    assert found.keep(bits=4.0).names == ()
    assert set(found.keep(bits=16).names) == {f"layer{i}" for i in range(4)}
    assert "keep layer1: 7.00 bits a weight" in str(kept)


def test_a_small_layer_is_cheaper_to_keep() -> None:
    found = made([1.0, 0.5], [1000, 10])
    assert found.keep(bits=4.2).names == ("layer1",)


def test_eight_bits_leave_a_little() -> None:
    found = made([1.0, 9.0], [100, 100])
    kept = found.keep(bits=6.0, upper=8)
    assert kept.names == ("layer1",) and kept.bits == 6.0
    assert kept.cost == pytest.approx(1.0 + 9.0 / 256)
    assert kept.settings == {"per_layer": {"layer1": {"bits": 8}}}
    assert found.keep(bits=6.0, upper=7).settings == {"per_layer": {"layer1": {"bits": 7, "packed": False}}}


def test_what_servers_join_is_chosen_together() -> None:
    """The costliest layer is alone the best choice, and with its neighbours too dear for the budget."""
    leaves = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    found = made([9.0, 1.0, 1.0, 4.0, 2.0, 1.0], [100] * 6)
    named = [
        replace(part, name=f"0.{leaf}", layers=(f"0.{leaf}",)) for part, leaf in zip(found.parts, leaves, strict=True)
    ]
    found = replace(found, parts=named)
    assert found.keep(bits=5, upper=8).names == ("0.attn.q_proj",)
    assert found.keep(bits=5, upper=8, joined=True).names == ("0.mlp.down_proj",)
    assert found.keep(bits=5.5, upper=8, joined=True).names == ("0.mlp.gate_proj", "0.mlp.up_proj")
    kept = found.keep(bits=6, upper=8, joined=True)
    assert kept.names == ("0.attn.q_proj", "0.attn.k_proj", "0.attn.v_proj") and kept.bits == 6


def test_whole_rows_are_counted_and_asked_for_as_quantize_makes_them() -> None:
    case = models.make("llama")
    found = sensitivity(case.model, case.batches, samples=2, method="rtn", **QUICK)
    kept = found.keep(bits=6.5, upper=8, joined=True, whole_rows=True)
    fields = {"bits": 8, "group_size": -1, "symmetric": True}
    assert kept.names and kept.settings == {"per_layer": dict.fromkeys(kept.names, fields)}
    made = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False, **kept.settings)
    rows = [row for row in made.awq_report.layers if row.status != "float"]
    assert {row.name for row in rows if (row.bits, row.group_size) == (8, -1)} == set(kept.names)
    assert stored_bits(rows) == pytest.approx(kept.bits) and kept.bits <= 6.5
    with pytest.raises(ValueError, match="whole_rows=True is for layers of 8 bits: give upper=8, not 'float'"):
        found.keep(bits=9, whole_rows=True)


def test_the_choice_is_near_the_best_there_is() -> None:
    """Against every subset: greedy by cost a bit, and at most one layer's saving short of the best."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(8, generator=generator).tolist()
    weights = torch.randint(50, 200, (8,), generator=generator).tolist()
    found = made(costs, weights)
    for budget in (5.0, 6.0, 8.0, 10.0):
        best = max(
            sum(costs[i] for i in subset)
            for size in range(9)
            for subset in itertools.combinations(range(8), size)
            if 12 * sum(weights[i] for i in subset) <= (budget - 4) * sum(weights)
        )
        kept = found.keep(bits=budget)
        assert kept.bits <= budget
        assert kept.cost_before - kept.cost >= best - max(costs)


def test_the_settings_can_be_given_to_quantize() -> None:
    case = models.make("llama")
    found = sensitivity(case.model, case.batches, samples=2, **QUICK)
    low = sum(p.bits * p.weights for p in found.parts) / sum(p.weights for p in found.parts)
    kept = found.keep(bits=low + 4)
    assert kept.names
    model = awq_ext.quantize(
        copy.deepcopy(case.model), case.batches, group_size=16, n_grid=3, progress=False, **kept.settings
    )
    floats = {row.name for row in model.awq_report.layers if row.status == "float"}
    assert floats == {*kept.names, "lm_head"}
    better = awq_ext.evaluate(model, case.batches[:2], reference=case.model)["kl"].value
    assert better < found.together
    eight = found.keep(bits=low + 1, upper=8)
    mixed = awq_ext.quantize(
        copy.deepcopy(case.model), case.batches, group_size=16, n_grid=3, progress=False, **eight.settings
    )
    assert {row.name for row in mixed.awq_report.layers if row.bits == 8} == set(eight.names) != set()


def test_every_form() -> None:
    found = made([1.0, 9.0], [100, 100])
    assert json.loads(json.dumps(found.to_dict()))["parts"][1]["cost"]["value"] == 9
    lines = str(found).splitlines()
    assert "all together 10" in lines[0] and lines[4].split()[0] == "layer1" and "90.0%" in lines[4]
    assert found._repr_html_().startswith("<table>")
    with pytest.raises(KeyError):
        found["nothing"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"by": "row"}, "by='row'"), ({"samples": 0}, "samples=0"), ({"bits": 9}, "bits=9")],
)
def test_unusable_arguments(settings: dict[str, object], message: str) -> None:
    case = models.make("llama")
    with pytest.raises(ValueError, match=message):
        sensitivity(case.model, case.batches, **QUICK, **settings)


@pytest.mark.parametrize("settings", [{"bits": 3.9}, {"bits": 5, "upper": 4}, {"bits": 5, "upper": "int8"}])
def test_impossible_budgets(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"already|upper="):
        made([1.0], [10]).keep(**settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "experts in a list"])
def test_mixtures_of_experts(name: str) -> None:
    """Experts in one parameter are one part, those in a list a part each; what is chosen can be given to quantize()."""
    made = architectures.make_or_skip(name)
    settings = QUICK | {"min_tokens": 1}
    snapshot = Snapshot(made.model)
    found = sensitivity(made.model, made.batches, **settings)
    snapshot.assert_unchanged()
    fused = name in architectures.TRANSFORMERS
    experts = [part for part in found.parts if ".experts" in part.name]
    assert len(experts) == (2 if fused else 2 * 4 * 3) and all(
        len(part.layers) == (8 if fused else 1) for part in experts
    )
    assert not any(part.name.endswith(("mlp.gate", "0.gate", "1.gate")) for part in found.parts)  # routers stay float
    layers = [layer for part in found.parts for layer in part.layers]
    assert len(layers) == len(set(layers)) and found[layers[-1]].cost.value > 0
    # a budget that reaches for experts
    weights = sum(part.weights for part in found.parts)
    low = sum(part.bits * part.weights for part in found.parts) / weights
    kept = found.keep(bits=low + 0.9 * 4, upper=8)
    assert any(".experts" in layer for layer in kept.names)
    model = architectures.make(name).model
    quick = {"group_size": 16, "n_grid": 3, "min_tokens": 1, "progress": False}
    report = awq_ext.quantize(model, made.batches, **quick, **kept.settings).awq_report
    assert {row.name for row in report.layers if row.bits == 8} == set(kept.names)
    kept = found.keep(bits=low + 0.9 * (experts[0].float_bits - low))
    model = architectures.make(name).model
    report = awq_ext.quantize(model, made.batches, **quick, **kept.settings).awq_report
    int4 = {row.name for row in report.layers if row.status == "int4"}
    assert int4 & set(layers) == set(layers) - set(kept.names) != set()
