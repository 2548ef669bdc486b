"""Output layers that share the embedding's weight: quantized beside it, put back where they stay float, and undone."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from checks import Snapshot, same_bits
from torch import Tensor, nn

import awq_ext
from awq_ext import QuantLinear
from awq_ext.reporting.tables import format_bytes
from awq_ext.standins.tied import keep_untied, tied_to_embedding, with_own_weight
from awq_ext.undo.journal import Journal

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}


class BiasTied(models.TiedNet):
    """Its head has a bias that the model holds a second time, as BERT's has."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(models.HIDDEN, models.VOCAB)
        self.lm_head.weight, self.spare = self.embed.weight, self.lm_head.bias


def weight_of(model: nn.Module) -> Tensor:
    return model.embed.weight.detach().clone()


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("kind", [models.TiedNet, BiasTied])
def test_the_head_is_quantized_beside_the_embedding(kind: type[nn.Module], head: str) -> None:
    torch.manual_seed(0)
    model, batches = kind(), models.token_batches()
    embedding, values = model.embed.weight, weight_of(model)
    awq_ext.quantize(model, batches, head=head, **FAST)
    assert isinstance(model.lm_head, QuantLinear) and model.awq_report["lm_head"].status == head
    assert model.embed.weight is embedding and same_bits(embedding, values)
    # what rounding moves, and with four bits scales and clips too
    assert (model.lm_head.weight - values).norm() < {"int8": 0.01, "int4": 0.2}[head] * values.norm()
    assert "shared" not in {name.partition(".")[0] for name in dict(model.named_parameters())}
    if kind is BiasTied:
        assert model.lm_head.bias is not model.spare


def test_the_report_has_the_loss_of_a_tied_head() -> None:
    torch.manual_seed(0)
    rows = {
        head: awq_ext.quantize(models.TiedNet(), models.token_batches(), head=head, **FAST).awq_report["lm_head"]
        for head in ("float", "int4")
    }
    assert rows["float"].note == "the output layer, by its name"
    assert 0 < rows["int4"].loss <= rows["int4"].loss_rtn


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (models.TiedNet, "lm_head: {held} beside 7.8 KiB in float, which are the embedding alone now"),
        (models.Net, "lm_head: {held} in place of 7.8 KiB in float"),
    ],
)
def test_the_report_tells_what_the_head_takes(kind: type[nn.Module], says: str) -> None:
    model = awq_ext.quantize(kind(), models.token_batches(), head="int8", **FAST)
    assert says.format(held=format_bytes(model.lm_head.nbytes)) in model.awq_report.notes


@pytest.mark.parametrize(
    "settings", [{"skip": ("lm_head",)}, {"only": ("*.mlp.*",)}, {"min_weights": models.HIDDEN * models.VOCAB + 1}]
)
def test_a_head_that_stays_float_stays_tied(settings: dict[str, Any]) -> None:
    model = models.TiedNet()
    model.wide = nn.Linear(models.HIDDEN, 3 * models.VOCAB)  # keeps min_weights from leaving nothing
    model.norm = nn.Sequential(model.norm, Through(model.wide))
    head = model.lm_head
    awq_ext.quantize(model, models.token_batches(), head="int4", blocks=[], **FAST | settings)
    assert model.lm_head is head and head.weight is model.embed.weight


class Through(nn.Module):
    """Calls a Linear and passes its input on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.linear(x).sum(-1, keepdim=True)


def test_only_the_head() -> None:
    model = models.TiedNet()
    awq_ext.quantize(model, models.token_batches(), head="int4", only=("lm_head",), **FAST)
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == ["lm_head"]


def test_a_fake_quantized_head_is_a_float_layer_of_its_own() -> None:
    model = models.TiedNet()
    values = weight_of(model)
    awq_ext.quantize(model, models.token_batches(), head="int4", packed=False, **FAST)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is not model.embed.weight
    assert same_bits(model.embed.weight, values) and not torch.equal(model.lm_head.weight, values)


@pytest.mark.parametrize("when", ["the loader", "a block", "the end"])
def test_an_error_leaves_it_tied(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = models.TiedNet(), models.token_batches()
    if when == "the end":

        def fail(*_: object) -> None:
            raise RuntimeError("at the end")

        monkeypatch.setattr("awq_ext.pipeline.quantize.reasons_to_stay", fail)
    if when == "a block":
        batches = [*batches, torch.full_like(batches[0], models.VOCAB)]  # an index that the embedding lacks
    before = Snapshot(model)
    with pytest.raises((RuntimeError, IndexError, ValueError, awq_ext.CalibrationError)):
        awq_ext.quantize(model, [] if when == "the loader" else batches, head="int4", **FAST)
    before.assert_unchanged()
    assert model.lm_head.weight is model.embed.weight


def test_a_plan_shows_the_head_and_leaves_it_tied() -> None:
    model = models.TiedNet()
    before = Snapshot(model)
    plan = awq_ext.plan(model, models.token_batches()[0], head="int4", group_size=16)
    (group,) = (group for group in plan.groups if group.layers == ("lm_head",))
    assert group.bits == (4,) and group.fold == "run time" and "lm_head" not in plan.stays_float
    before.assert_unchanged()


class Named(models.TiedNet):
    """A tied output layer that only ``get_output_embeddings`` tells."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed, self.lm_head = self.lm_head, nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembed(super().forward(ids))


def test_an_output_layer_of_another_name(tmp_path: Any) -> None:
    model, batches = Named(), models.token_batches()
    awq_ext.quantize(model, batches, head="int4", **FAST)
    assert isinstance(model.unembed, QuantLinear)
    loaded = awq_ext.load(Named(), awq_ext.save(model, tmp_path / "model"))
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert same_bits(loaded.embed.weight, model.embed.weight)


def test_a_model_without_an_output_layer_is_told_so() -> None:
    case = models.make("mlp")
    before = Snapshot(case.model)
    with pytest.raises(ValueError, match=r"AwqConfig\.head='int4': \w+ names no output layer .*use head=\"float\""):
        awq_ext.quantize(case.model, case.batches, head="int4", **FAST)
    before.assert_unchanged()


class ByTable(models.Net):
    """Its output layer is no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.table = nn.Identity(), nn.Bilinear(2, 2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.table


def test_an_output_layer_that_is_no_linear_is_told_so() -> None:
    with pytest.raises(ValueError, match="has a Bilinear as its output layer, no Linear"):
        awq_ext.quantize(ByTable(), models.token_batches(), head="int4", **FAST)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_head_with_a_forward_of_its_own_is_told_so() -> None:
    model = models.Net()
    model.lm_head = Doubling(models.HIDDEN, models.VOCAB)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"cannot be quantized \(lm_head: Doubling has a forward of its own\)"):
        awq_ext.quantize(model, models.token_batches(), head="int4", **FAST)
    before.assert_unchanged()


def test_heads_that_share_with_a_linear_are_left_alone() -> None:
    model = models.TiedNet()
    model.twin = nn.Linear(models.HIDDEN, models.VOCAB, bias=False)
    model.twin.weight = model.lm_head.weight
    assert tied_to_embedding(model, {"lm_head": model.lm_head}) == {}
    with pytest.raises(ValueError, match=r"its weight is shared with embed\.weight, twin\.weight"):
        awq_ext.quantize(model, models.token_batches(), head="int4", **FAST)


def test_the_stand_in_shares_the_memory() -> None:
    model = models.TiedNet()
    linear = with_own_weight(model, model.lm_head)
    assert linear.weight is not model.embed.weight and linear.weight.data_ptr() == model.embed.weight.data_ptr()
    assert linear._forward_hooks is model.lm_head._forward_hooks


class Config:
    def __init__(self, inner: Config | None = None) -> None:
        self.tie_word_embeddings = True
        self.inner = inner

    def get_text_config(self, decoder: bool = False) -> Config:
        return self.inner or self


class Parted(nn.Module):
    """Lists of ties as transformers 4 (a list) and 5 (a dictionary) have them."""

    def __init__(self, keys: Any, known: dict[str, str] | None, inner: Config | None = None) -> None:
        super().__init__()
        self.config = Config(inner)
        type(self)._tied_weights_keys = keys
        if known is not None:
            self.all_tied_weights_keys = known


@pytest.mark.parametrize(
    ("keys", "known", "left", "tied"),
    [
        (["lm_head.weight"], None, [], False),
        ([r"lm_head\.weight", r"lm_head\.bias"], None, [], False),
        (["encoder.embed.weight", "lm_head.weight"], None, ["encoder.embed.weight"], True),
        ({"lm_head.weight": "embed.weight"}, {"lm_head.weight": "embed.weight"}, {}, False),
        (
            {"lm_head.weight": "shared.weight"},
            {"lm_head.weight": "shared.weight", "encoder.embed.weight": "shared.weight"},
            {},
            True,
        ),
        (["other.weight"], None, ["other.weight"], True),
    ],
)
def test_ties_that_are_told_no_more(keys: Any, known: Any, left: Any, tied: bool) -> None:
    model = Parted(keys, known, inner := Config())
    with pytest.raises(RuntimeError), Journal() as journal:
        keep_untied(model, ("lm_head",), journal)
        assert model._tied_weights_keys == left and type(model._tied_weights_keys) is type(keys)
        assert (model.config.tie_word_embeddings, inner.tie_word_embeddings) == (tied, tied)
        if known is not None:
            assert "lm_head.weight" not in model.all_tied_weights_keys
        raise RuntimeError
    assert "_tied_weights_keys" not in vars(model) and model._tied_weights_keys is keys
    assert model.config.tie_word_embeddings and inner.tie_word_embeddings
    assert known is None or model.all_tied_weights_keys is known


def test_a_copy_is_quantized_without_the_model_itself() -> None:
    model = models.TiedNet()
    found = awq_ext.compare(
        model,
        models.token_batches(),
        {"same": models.token_batches()},
        [{"method": "rtn", "head": "int4"}],
        group_size=16,
    )
    assert not found.rows[1].error and model.lm_head.weight is model.embed.weight
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.embed.weight
