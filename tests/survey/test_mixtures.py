"""Experts: statistics of their own rows, one scale for what they all read, routers left alone, seldom called ones rounded."""

from __future__ import annotations

import copy
from typing import Any

import architectures
import pytest
import torch
from architectures import HIDDEN, INNER, ExpertList
from mixtures import linears, surveyed, two_layers
from torch import Tensor, nn
from torch.nn import functional as F

import awq_ext
from awq_ext.calibration.statistics import collect
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import lockstep
from awq_ext.survey.budget import statistics_bytes

SETTINGS = {"group_size": 16, "n_grid": 4, "progress": False}
KINDS = ("w1", "w2", "w3")


def batches(dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 20, HIDDEN).to(dtype) for _ in range(count)]


def avoid(layer: ExpertList, expert: int) -> None:
    """No token chooses ``expert`` any more: every token has the same loud score against it."""
    with torch.no_grad():
        layer.norm.bias[0] = 50.0
        layer.gate.weight[:, 0] = 0.0
        layer.gate.weight[expert, 0] = -10.0


def test_experts_share_a_scale_and_routers_are_left() -> None:
    model = two_layers()
    for i, found in enumerate(surveyed(model, [Call((batches()[0],))])):
        wide, *narrow = found.groups
        assert set(wide.linears) == {f"{i}.experts.{e}.{kind}" for e in range(4) for kind in ("w1", "w3")}
        assert sorted(map(len, wide.parts)) == [2] * 4
        assert wide.producer == f"{i}.norm"
        assert wide.readers == ((model[i].gate, "weight"),)
        assert [group.linears for group in narrow] == [(f"{i}.experts.{e}.w2",) for e in range(4)]
        assert [group.near for group in narrow] == [(f"{i}.experts.{e}.w3", f"{i}.experts.{e}.w1") for e in range(4)]
        assert found.reasons == {f"{i}.gate": "router of experts"}
        # one second moment for each expert's input and one for what goes into its w2
        assert statistics_bytes(found) == 4 * (4 * HIDDEN**2 + 16 * HIDDEN + 4 * INNER**2 + 16 * INNER)


def test_each_expert_has_the_statistics_of_its_rows() -> None:
    model, calls = two_layers(), [Call((x,)) for x in batches()]
    seen: dict[str, list[Tensor]] = {}
    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0]))
    found = surveyed(model, calls)
    seen.clear()
    with torch.no_grad():
        for call in calls:
            model(*call.args)
        expected = {name: torch.cat(rows).double() for name, rows in seen.items()}
        with lockstep(model, [s.block for s in found], calls) as visits:
            for one, (_, stops) in zip(found, visits, strict=True):
                books, _ = collect(one, stops, torch.device("cpu"), one is found[-1])
                for group, book in zip(one.groups, books, strict=True):
                    for name in group.linears:
                        rows = expected[name]
                        assert book.inputs[name].rows == len(rows)
                        # sums of products in fp32, in any order
                        bound = (len(rows) + 2) * 2.0**-24 * (rows.abs().T @ rows.abs())
                        assert ((book.inputs[name].stats.second_moment() - rows.T @ rows).abs() <= bound).all()
                    everything = torch.cat([expected[part[0]] for part in group.inputs])
                    assert book.rows == len(everything)
                    torch.testing.assert_close(book.x_mean().double(), everything.abs().mean(0), rtol=1e-5, atol=0)


def test_scales_go_into_the_norm_and_the_router_makes_up_for_it() -> None:
    model, samples = two_layers(), batches()
    gates = [layer.gate.weight.detach().clone() for layer in model]
    norms = [layer.norm.weight.detach().clone() for layer in model]
    with torch.no_grad():
        chosen = model[0].gate(model[0].norm(samples[0])).topk(2).indices
    awq_ext.quantize(model, samples, **SETTINGS)
    report = model.awq_report
    assert not report.warnings
    for i, layer in enumerate(model):
        assert type(layer.gate) is nn.Linear
        assert report[f"{i}.gate"].note == "router of experts"
        rows = [report[f"{i}.experts.{e}.{kind}"] for e in range(4) for kind in ("w1", "w3")]
        assert {row.applied for row in rows} == {"norm"}
        assert len({(row.group, row.scale, row.alpha) for row in rows}) == 1
        # w / s is rounded once and so is gate * s: the product keeps what it was to two roundings
        product, before = layer.gate.weight * layer.norm.weight, gates[i] * norms[i]
        assert ((product - before).abs() <= 4 * torch.finfo(torch.float32).eps * before.abs()).all()
        assert not torch.equal(layer.norm.weight, norms[i])
        assert all(report[f"{i}.experts.{e}.w2"].applied == "linear" for e in range(4))
        assert all(row.loss <= row.loss_rtn for row in report.layers if row.status == "int4")
    with torch.no_grad():
        assert torch.equal(model[0].gate(model[0].norm(samples[0])).topk(2).indices, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_experts_divide_their_rows(dtype: torch.dtype) -> None:
    model = two_layers(dtype=dtype)
    gates = [layer.gate.weight.detach().clone() for layer in model]
    awq_ext.quantize(model, batches(dtype), **SETTINGS)
    rows = [row for row in model.awq_report.layers if row.name.endswith(("w1", "w3"))]
    assert all(row.applied in ("run time", "") for row in rows)
    assert any(row.applied == "run time" for row in rows)
    assert all(torch.equal(layer.gate.weight, gate) for layer, gate in zip(model, gates, strict=True))


@pytest.mark.parametrize("fold", ["auto", "never", "always"])
def test_experts_that_no_token_chose_are_rounded_and_named(fold: str) -> None:
    model, samples = two_layers(), batches()
    avoid(model[0], 2)
    with pytest.warns(
        UserWarning, match=r"0\.experts\.2\.w1 \(0\).*0\.experts\.2\.w2 \(0\).*rounded to nearest"
    ) as seen:
        awq_ext.quantize(model, samples, fold=fold, min_tokens=1, **SETTINGS)
    assert len(seen) == 1
    for kind in KINDS:
        row = model.awq_report[f"0.experts.2.{kind}"]
        assert (row.status, row.method, row.tokens, row.loss) == ("int4", "rtn", 0, None)
        assert row.note == "no calibration row reached it"
        assert isinstance(model[0].experts[2].get_submodule(kind), awq_ext.QuantLinear)
    assert model(samples[0]).isfinite().all()


def test_experts_that_only_a_later_batch_calls_have_its_statistics() -> None:
    model, (first, *others) = two_layers(), batches()
    avoid(model[0], 2)
    with torch.no_grad():  # against expert 2 only where channel 0 of the input is ordinary
        model[0].norm.bias[0] = 0.0
        model[0].norm.weight[0] = 1.0
    first[..., 0], others[0][..., 0], others[1][..., 0] = 30.0, -30.0, -30.0
    awq_ext.quantize(model, [first, *others], min_tokens=1, **SETTINGS)
    rows = [model.awq_report[f"0.experts.2.{kind}"] for kind in KINDS]
    assert all(row.method == "awq" and row.tokens == 160 and row.loss <= row.loss_rtn for row in rows)
    assert {row.applied for row in rows[::2]} <= {"norm", "run time", ""}
    assert rows[0].group == rows[2].group == model.awq_report["0.experts.0.w1"].group


def test_min_tokens_is_the_fewest_rows_that_count() -> None:
    model, samples = two_layers(), batches()
    counted = awq_ext.quantize(two_layers(), samples, min_tokens=1, **SETTINGS).awq_report
    tokens = {row.name: row.tokens for row in counted.layers if row.status == "int4"}
    limit = sorted(tokens.values())[len(tokens) // 2]
    with pytest.warns(UserWarning, match="fewer than min_tokens"):
        awq_ext.quantize(model, samples, min_tokens=limit, **SETTINGS)
    for name, rows in tokens.items():
        row = model.awq_report[name]
        assert (row.method == "rtn") == (rows < limit), row
        assert (f"{rows} calibration rows, fewer than min_tokens={limit}" == row.note) == (rows < limit)


def test_too_few_rows_of_experts_may_be_those_that_a_limit_left() -> None:
    ids = torch.randint(50, (2, 400))
    left_out = "max_calib_tokens left text out"
    for most in (0, 300, 800):
        model = nn.Sequential(nn.Embedding(50, HIDDEN), *two_layers())
        given = {"min_tokens": 1000, "max_calib_tokens": most}
        with pytest.warns(UserWarning, match="fewer than min_tokens"):
            report = awq_ext.quantize(model, [ids], **SETTINGS, **given).awq_report
        assert any(left_out in text for text in report.warnings) == (most == 300)


@pytest.mark.parametrize(
    "left",
    [
        {"skip": ("*.experts.*",)},
        {"only": ("*.gate", "*.shared")},
        {"skip": ("*.experts.*.w?",), "blocks": []},
    ],
    ids=str,
)
def test_routers_stay_float_beside_experts_that_do(left: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = architectures.loud(nn.Sequential(WithShared(), WithShared()))
    routers = [layer.gate.weight.detach().clone() for layer in model]
    plan = awq_ext.plan(model, batches()[0], group_size=16, **left)
    awq_ext.quantize(model, batches(), **SETTINGS, **left)
    report = model.awq_report
    for i, layer in enumerate(model):
        assert report[f"{i}.gate"].note == plan.stays_float[f"{i}.gate"] == "router of experts"
        assert torch.equal(layer.gate.weight, routers[i])
        assert all(report[f"{i}.experts.{e}.{kind}"].status == "float" for e in range(4) for kind in KINDS)
        assert report[f"{i}.shared"].status == "int4"


class WithShared(ExpertList):
    """Beside the experts, something large that reads what the router reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(HIDDEN, 2 * HIDDEN * INNER)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(self.norm(x)).mean(-1, keepdim=True)


class NamedInput(nn.Linear):
    """No Linear in what it computes, nor in what it calls its input."""

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


class OddExpert(architectures.Expert):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = NamedInput(HIDDEN, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(rows=x)) * self.w3(x))


def test_experts_of_other_classes_are_watched_as_far_as_they_can_be() -> None:
    model = two_layers()
    for layer in model:
        layer.experts = nn.ModuleList([OddExpert() for _ in range(4)])
    awq_ext.quantize(model, batches(), **SETTINGS)
    report = model.awq_report
    assert report["0.experts.0.w1"].note == "NamedInput has a forward of its own"
    assert report["0.experts.0.w3"].status == "int4"
    assert report["0.gate"].note == "router of experts"


def test_a_model_with_nothing_but_routers_says_so() -> None:
    with pytest.raises(awq_ext.CalibrationError, match=r"among them 0\.gate \(router of experts\)"):
        awq_ext.quantize(two_layers(), batches(), only=("*.gate",), **SETTINGS)


def test_lists_that_are_no_experts_keep_their_ways() -> None:
    class Heads(nn.Module):
        """All read all rows; the last has as many outputs as there are others."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)
            self.heads = nn.ModuleList([nn.Linear(HIDDEN, 16) for _ in range(3)])
            self.gate = nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return torch.cat([*(head(h) for head in self.heads), self.gate(h)], -1)

    model = architectures.loud(nn.Sequential(Heads(), nn.Linear(51, HIDDEN)))
    awq_ext.quantize(model, batches(), blocks=[], **SETTINGS)
    rows = model.awq_report.layers
    assert all(row.status == "int4" for row in rows)
    assert model.awq_report["0.gate"].group == model.awq_report["0.heads.0"].group == "0.heads.0"


class Classifier(nn.Module):
    """As many classes as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([architectures.Feed() for _ in range(3)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_layers_of_a_model_taken_as_a_whole_are_no_experts() -> None:
    model = architectures.loud(Classifier())
    awq_ext.quantize(model, batches(), blocks=[], **SETTINGS)
    assert model.awq_report["head"].status == "int4"
    assert len({row.group for row in model.awq_report.layers}) == 7
    model = architectures.loud(Classifier())
    awq_ext.quantize(model, batches(), blocks=[], skip=("layers.*",), **SETTINGS)
    assert model.awq_report["head"].status == "int4"


class Between(nn.Module):
    """A model of one mixture layer, behind another part that has blocks of its own."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.body = nn.ModuleDict({"layers": nn.ModuleList([ExpertList()])})
        self.head = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body["layers"]:
            x = layer(self.front(x))
        return self.head(x)


def test_the_experts_of_an_only_layer_are_no_blocks() -> None:
    torch.manual_seed(2)
    model = architectures.loud(nn.Sequential(ExpertList()))
    samples, twin = batches(), copy.deepcopy(model)
    plan = awq_ext.plan(copy.deepcopy(model), samples[0], group_size=16)
    assert plan.stays_float == {"0.gate": "router of experts"}
    awq_ext.quantize(model, samples, **SETTINGS)
    assert [block.name for block in model.awq_report.blocks] == [""]
    awq_ext.quantize(twin, samples, blocks=[], **SETTINGS)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    named = awq_ext.quantize(architectures.loud(nn.Sequential(ExpertList())), samples, blocks=["0"], **SETTINGS)
    assert [block.name for block in named.awq_report.blocks] == ["0"]


def test_other_blocks_stay_what_they_are_beside_an_only_layer_of_experts() -> None:
    model = architectures.loud(Between(nn.Sequential(architectures.Feed(), architectures.Feed())))
    awq_ext.quantize(model, batches(), min_tokens=1, **SETTINGS)
    report = model.awq_report
    assert [block.name for block in report.blocks] == ["front.0", "front.1", "body.layers.0"]
    assert report["body.layers.0.gate"].note == "router of experts"
    assert report["head"].note == "outside the calibrated blocks"
    assert all(report[f"body.layers.0.experts.{e}.w2"].status == "int4" for e in range(4))


def test_layers_with_as_many_classes_behind_them_are_blocks() -> None:
    model = architectures.loud(Classifier())
    awq_ext.quantize(model, batches(), **SETTINGS)
    assert [block.name for block in model.awq_report.blocks] == ["layers.0", "layers.1", "layers.2"]
