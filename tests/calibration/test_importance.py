"""How much the output reacts to each row: the estimate against the exact trace, and what quantizing makes of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import awq_ext
from awq_ext.calibration import importance
from awq_ext.calibration.importance import find_weights
from awq_ext.calibration.row_weights import PositionWeights, RowWeights, Weights
from awq_ext.forwards.calls import CalibrationError, Call
from awq_ext.survey.selection import eligible_linears
from awq_ext.survey.survey import survey_model

WIDTH = 16
# a function, as not every model here has a head
FAST = {"group_size": 16, "fold": "never", "skip": (lambda name, _: name == "head",), "progress": False}


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


def weights_of(model: nn.Module, calls: list[Call], batches: int = 0) -> Weights:
    with torch.no_grad():
        return find_weights(model, calls, survey_of(model, calls[0], []), batches)


def of(found: Weights, call: Call, name: str, x: Tensor) -> Tensor | None:
    found.begin(call)
    return found.following(name, x)


def powers(weights: Tensor) -> Tensor:
    """The nearest powers of 2."""
    return torch.exp2(weights.double().log2().round()).float()


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
    assert 2**-0.5 <= float(rows.mean()) <= 2**0.5  # 1 before weights are rounded to powers of 2
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


class Mixer(nn.Module):
    """A block in which every row reads the first one too, and which writes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        x += torch.tanh(y + y[..., :1, :])
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = x * 1
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


class Reader(Stack):
    """Of token ids, of which the first eight lie far from all others; logits for every one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.head = nn.Linear(WIDTH, 50)
        self.sizes: list[int] = []
        with torch.no_grad():
            self.embed.weight[:8] *= 4

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if torch.is_grad_enabled():
            self.sizes.append(len(input_ids))
        return super().forward(self.embed(input_ids))


def divergence(logits: Tensor, found: Tensor) -> Tensor:
    """Of what ``found`` says from what ``logits`` say: nats, summed over rows."""
    return nn.functional.kl_div(found.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum")


def survey_of(model: nn.Module, call: Call, blocks: list[str] | None) -> list[Any]:
    eligible = eligible_linears(model, lambda name, module: "skipped" if name == "head" else None)
    with torch.no_grad():
        return survey_model(model, call, eligible, blocks, awq_ext.AwqConfig(skip=("head",)))


@pytest.mark.parametrize("batches", [0, 2])
def test_blocks_that_run_once_more_weigh_the_same(batches: int) -> None:
    torch.manual_seed(0)
    model, calls = Stack(), [Call((torch.randn(2, 9, WIDTH),)) for _ in range(3)]
    found = [find_weights(model, calls, survey_of(model, calls[0], blocks), batches) for blocks in (None, [])]
    for name in ("layers.0.inner", "layers.1.inner", "layers.2.inner"):
        for call in calls:
            lean, whole = (of(one, call, name, call.args[0]) for one in found)
            assert torch.equal(lean, whole)
            assert not torch.equal(lean, torch.ones_like(lean))
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_forwards_of_blocks_are_put_back() -> None:
    model = Stack()
    surveys = survey_of(model, Call((torch.randn(2, 9, WIDTH),)), None)
    own = model.layers[1].forward = model.layers[1].forward
    with pytest.raises(CalibrationError, match="rejected calibration batch 0"):
        find_weights(model, [Call((torch.randn(2, 9, WIDTH + 1),))], surveys)
    assert [vars(layer).get("forward") for layer in model.layers] == [None, own, None]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_some_batches_stand_for_all(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, mask = Stack(), torch.ones(2, 9)
    if padding != "none":
        mask[1, slice(0, 4) if padding == "left" else slice(5, 9)] = 0
    calls = [Call((torch.randn(2, 9, WIDTH),), {"attention_mask": mask}) for _ in range(6)]
    found = weights_of(model, calls, batches=2)
    assert isinstance(found, PositionWeights)
    monkeypatch.setattr(importance, "_round_to_powers", lambda weights: None)
    each = weights_of(model, [calls[1], calls[4]])  # the middles of two halves
    name, kept = "layers.0.inner", mask != 0
    rows = torch.stack([of(each, call, name, call.args[0]) for call in (calls[1], calls[4])]).view(2, 2, 9)
    got = of(found, calls[5], name, calls[5].args[0]).view(2, 9)
    positions = (kept.long().cumsum(-1) - 1).where(kept, -1)
    for first, last in ((0, 0), (1, 2), (3, 6), (7, 14)):
        stretch = (positions >= first) & (positions <= last)
        assert torch.equal(got[stretch], powers(rows[:, stretch].mean()).expand(int(stretch.sum())))


def test_one_window_of_a_batch_of_ids_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = Reader(), []
    for length in (9, 5, 7, 9, 6, 8):
        mask = torch.ones(4, 9, dtype=torch.long)
        for row, kept in enumerate((3, 4, length, 2)):
            mask[row, kept:] = 0
        batches.append({"input_ids": torch.randint(50, (4, 9)), "attention_mask": mask})
    found = weights_of(model, [Call((), batch) for batch in batches], batches=2)
    assert model.sizes == [1, 1]
    weights_of(model, [Call((), batch) for batch in batches[:2]], batches=2)
    assert model.sizes == 4 * [1]
    monkeypatch.setattr(importance, "_round_to_powers", lambda weights: None)
    # the middles of two halves, and the third row of each
    longest = [Call((), {key: value[2:3] for key, value in batches[i].items()}) for i in (1, 4)]
    each = weights_of(model, longest)
    x = [torch.randn(n, 9, WIDTH) for n in (1, 4)]
    rows = torch.cat(
        [of(each, call, "layers.1.inner", x[0])[:length] for call, length in zip(longest, (5, 6), strict=True)]
    )
    assert float(rows.mean()) == pytest.approx(1.0, rel=1e-5)
    first = torch.stack([of(each, call, "layers.1.inner", x[0])[0] for call in longest]).mean()
    got = of(found, Call((), batches[0]), "layers.1.inner", x[1]).view(4, 9)[:, 0]
    assert torch.equal(got, powers(first).expand(4))


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


def test_a_bias_takes_over_the_mean_of_what_the_output_reacts_to() -> None:
    torch.manual_seed(0)
    original, x = Gated(), torch.randn(400, WIDTH)
    means = {}
    for objective in ("layer", "model"):
        model = nn.Sequential(Gated())
        model[0].load_state_dict(original.state_dict())
        awq_ext.quantize(model, [x], method="gptq", objective=objective, bits=3, packed=False, **FAST)
        means[objective] = float((model(x) - original(x)).detach().mean(0).abs().max())
    # rows that do not count still do by a ten-thousandth, and fp32 sums 200 terms
    assert means["model"] < 1e-3 * means["layer"]


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_the_first_of_a_window_counts_by_what_reads_it(method: str) -> None:
    """By default, with error feedback."""
    errors = {"layer": 0.0, None: 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        original = Reader()
        batches = [torch.cat([torch.randint(8, (8, 1)), torch.randint(8, 50, (8, 40))], 1) for _ in range(6)]
        for objective in errors:
            model = Reader()
            model.load_state_dict(original.state_dict())
            awq_ext.quantize(model, batches, method=method, objective=objective, bits=3, packed=False, **FAST)
            assert not any("count alike" in note for note in model.awq_report.notes)
            with torch.no_grad():
                errors[objective] += sum(float(divergence(original(x).logits, model(x).logits)) for x in batches)
    assert errors[None] < 0.95 * errors["layer"]


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


class Closed(Reader):
    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids)


class Encoder(Reader):
    """Of token ids, with one score for each text."""

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids).logits.mean(1)


@pytest.mark.parametrize(
    "model, x",
    [(Closed(), torch.arange(20)[None]), (Encoder(), torch.arange(20)[None]), (Stack(), torch.randn(2, 20, WIDTH))],
)
def test_rows_count_alike_by_default_where_tokens_have_no_logits_or_no_gradients(model: nn.Module, x: Tensor) -> None:
    """A note says so, but not of a model that reads no tokens: nobody would expect it of one."""
    other = copy.deepcopy(model)
    report = awq_ext.quantize(model, [x], method="gptq", **FAST).awq_report
    told = [note for note in report.notes if "all calibration rows count alike: " in note]
    assert len(told) == (0 if x.is_floating_point() else 1) and "Error" not in "".join(told)
    awq_ext.quantize(other, [x], method="gptq", objective="layer", **FAST)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


# Those that cannot go on with what they wrote: encoders, models with an encoder, a state instead of keys and values.
WRITE_NOTHING = {"BERT", "T5", "ViT", "Whisper", "Mamba", *architectures.PLAIN}


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize("name", architectures.params())
def test_architectures(name: str, batches: int) -> None:
    case = architectures.make_or_skip(name)
    settings = {"method": "awq+gptq", "objective": "model", "group_size": 16, "min_tokens": 0, "progress": False}
    report = awq_ext.quantize(case.model, case.batches, weighed_batches=batches, **settings).awq_report
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
    settings = {"method": "gptq", "weighed_batches": 0, "propagate": "quantized", "group_size": 16, "min_tokens": 0}
    report = awq_ext.quantize(case.model, case.batches, bits=2, packed=False, progress=False, **settings).awq_report
    assert all(known[False])
    assert any(known[True])
    assert not all(known[True])
    assert all(layer.loss <= layer.loss_rtn for layer in report.layers if layer.loss is not None)
