"""How much the output reacts to each row: the estimate against the exact trace, and what quantizing makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import awq_ext
from awq_ext.batches import Call
from awq_ext.blocks import CalibrationError
from awq_ext.groups import eligible_linears
from awq_ext.importance import find_row_weights
from awq_ext.prepare import survey_model
from awq_ext.weighting import RowWeights

WIDTH = 16
FAST = {"group_size": 16, "fold": "never", "skip": ("head",), "progress": False}


class Classifier(nn.Module):
    """Rows in, logits out, each row on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 12, bias=False)
        self.head = nn.Linear(12, 5, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(torch.tanh(self.first(x)) ** 2))


class Encoder(Classifier):
    """Likewise, but what it returns are no logits."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).logits


def weights_of(model: nn.Module, calls: list[Call]) -> RowWeights:
    config = awq_ext.AwqConfig(skip=("head",))
    eligible = eligible_linears(model, lambda name, module: "skipped" if name == "head" else None)
    with torch.no_grad():
        surveys = survey_model(model, calls[0], eligible, [], config)
        return find_row_weights(model, calls, surveys)


def of(found: RowWeights, call: Call, name: str, x: Tensor) -> Tensor | None:
    found.begin(call)
    return found.following(name, x)


def exact_traces(model: nn.Module, x: Tensor, softmax: bool) -> Tensor:
    """tr(J^T F J) of every row of x, J the Jacobian of what comes after ``first``."""
    traces = []
    for y in model.first(x).detach():
        jacobian = torch.autograd.functional.jacobian(lambda y: model.head(torch.tanh(y) ** 2), y)
        p = model.head(torch.tanh(y) ** 2).softmax(-1).detach()
        fisher = torch.diag(p) - torch.outer(p, p) if softmax else torch.eye(len(p))
        traces.append(torch.trace(jacobian.T @ fisher @ jacobian))
    return torch.stack(traces)


@pytest.mark.parametrize("cls, softmax", [(Classifier, True), (Encoder, False)])
def test_weights_are_the_trace_of_the_fisher_information(cls: Any, softmax: bool) -> None:
    torch.manual_seed(0)
    model, x = cls(), torch.randn(6, WIDTH) * torch.tensor([0.1, 0.3, 1, 1, 2, 3])[:, None]
    calls = [Call((x,)) for _ in range(600)]
    found = weights_of(model, calls)
    mean = torch.stack([of(found, call, "first", x) for call in calls]).mean(0)
    expected = exact_traces(model, x, softmax)
    # an estimate is a square of sums of signs: its deviation is at most 2^(1/2) times what it estimates, 0.06 of it after 600
    assert (mean - expected / expected.mean()).abs().le(0.25 * expected / expected.mean() + 1e-3).all()


def test_rows_that_a_mask_leaves_out_do_not_count() -> None:
    class Masked(Classifier):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
            return super().forward(x)

    mask = torch.ones(2, 9)
    mask[1, 3:] = 0
    calls = [Call((torch.randn(2, 9, WIDTH),), {"attention_mask": mask}) for _ in range(5)]
    found = weights_of(Masked(), calls)
    rows = torch.stack([of(found, call, "first", call.args[0]) for call in calls])[:, mask.flatten() != 0]
    assert float(rows.mean()) == pytest.approx(1.0)
    assert float(rows.min()) > 0


def test_rows_alike_where_nothing_matters() -> None:
    class Deaf(Classifier):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=0 * super().forward(x).logits)

    call = Call((torch.randn(7, WIDTH),))
    assert torch.equal(of(weights_of(Deaf(), [call]), call, "first", call.args[0]), torch.ones(7))


def test_other_rows_than_were_seen_get_none() -> None:
    calls = [Call((torch.randn(7, WIDTH),)), Call((torch.randn(3, WIDTH),))]
    found = weights_of(Classifier(), calls)
    assert of(found, calls[1], "first", calls[1].args[0]).shape == (3,)
    assert of(found, calls[0], "first", calls[1].args[0]) is None
    assert of(found, calls[0], "other", calls[0].args[0]) is None
    found.begin(calls[0])
    assert found.following("first", calls[0].args[0]) is not None
    assert found.following("first", calls[0].args[0]) is None  # a call more than there was


class Gated(nn.Module):
    """Rows of the second kind (x[-1] < 0) do not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * (x[..., -1:] > 0)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_errors_go_where_the_output_does_not_react(method: str) -> None:
    torch.manual_seed(0)
    original, kinds = Gated(), [torch.randn(WIDTH, WIDTH) for _ in range(2)]
    x = torch.cat([torch.randn(400, WIDTH) @ kinds[0], 3 * torch.randn(400, WIDTH) @ kinds[1]])
    x[:, -1] = torch.cat([torch.ones(400), -torch.ones(400)])
    errors = {}
    for objective in ("layer", "model"):
        model = nn.Sequential(Gated())
        model[0].load_state_dict(original.state_dict())
        awq_ext.quantize(model, [x], method=method, objective=objective, bits=3, packed=False, damping=0.01, **FAST)
        errors[objective] = float((model(x) - original(x)).detach().square().sum())
    assert errors["model"] < 0.9 * errors["layer"]


def test_parameters_ask_for_gradients_as_before() -> None:
    model = nn.Sequential(Gated(), nn.LayerNorm(32), nn.Linear(32, WIDTH))
    model[1].weight.requires_grad_(False)
    awq_ext.quantize(model, [torch.randn(20, WIDTH)], objective="model", **FAST)
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad
    assert model[1].bias.grad is None


def test_in_place_work_behind_a_linear() -> None:
    class InPlace(Classifier):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            y += 1
            return SimpleNamespace(logits=self.head(y.relu_()))

    model = nn.Sequential(InPlace())
    assert (
        awq_ext.quantize(model, [torch.randn(20, WIDTH)], objective="model", **FAST).awq_report["0.first"].status
        == "int4"
    )


def test_a_checkpointed_model() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(Classifier()), torch.randn(20, WIDTH)

    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Any:
            hidden = checkpoint(lambda x: torch.tanh(self.first(x)) ** 2, x, use_reentrant=False)
            return SimpleNamespace(logits=self.head(hidden))

    model = nn.Sequential(Checkpointed())
    model.load_state_dict(plain.state_dict())
    losses = [
        awq_ext.quantize(one, [x], objective="model", **FAST).awq_report["0.first"].loss for one in (plain, model)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("cls", [Classifier, Encoder])
def test_a_model_without_gradients_is_an_error_and_stays(cls: Any) -> None:
    class Closed(cls):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    model = nn.Sequential(Closed())
    first = model[0].first
    with pytest.raises(CalibrationError, match='objective="layer" needs none'):
        awq_ext.quantize(model, [torch.randn(20, WIDTH)], objective="model", **FAST)
    assert model[0].first is first
    assert first.weight.requires_grad
    awq_ext.quantize(model, [torch.randn(20, WIDTH)], objective="layer", **FAST)


# Those that cannot go on with what they wrote: encoders, models with an encoder, a state instead of keys and values.
WRITE_NOTHING = {"BERT", "T5", "ViT", "Whisper", "Mamba", *architectures.PLAIN}


@pytest.mark.parametrize("name", architectures.NAMES)
def test_architectures(name: str) -> None:
    case = architectures.make_or_skip(name)
    settings = {"method": "awq+gptq", "objective": "model", "group_size": 16, "min_tokens": 0, "progress": False}
    report = awq_ext.quantize(case.model, case.batches, **settings).awq_report
    assert any("that the model wrote" in note for note in report.notes) == (name not in WRITE_NOTHING)
    assert not any("could not write" in note for note in report.notes)
    losses = [(layer.loss, layer.loss_rtn) for layer in report.layers if layer.loss is not None]
    assert all(loss <= rtn for loss, rtn in losses)
    assert sum(loss < rtn for loss, rtn in losses) > len(losses) // 2


def test_experts_chosen_anew_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On quantized inputs routers send other rows to an expert than those that were weighed."""
    case = architectures.make_or_skip("Mixtral")
    known: dict[bool, list[bool]] = {False: [], True: []}
    following = RowWeights.following

    def see(self: RowWeights, name: str, x: Tensor) -> Tensor | None:
        found = following(self, name, x)
        known["experts" in name].append(found is not None)
        return found

    monkeypatch.setattr(RowWeights, "following", see)
    settings = {"method": "gptq", "objective": "model", "propagate": "quantized", "group_size": 16, "min_tokens": 0}
    report = awq_ext.quantize(case.model, case.batches, bits=2, packed=False, progress=False, **settings).awq_report
    assert all(known[False])
    assert any(known[True])
    assert not all(known[True])
    assert all(layer.loss <= layer.loss_rtn for layer in report.layers if layer.loss is not None)
