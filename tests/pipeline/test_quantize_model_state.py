"""What quantize() must leave alone in a model and in the caller's world, when all goes well."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext import QuantLinear
from awq_ext.undo.thread_state import ThreadState

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 3, "progress": False}


@pytest.mark.parametrize("packed", [True, False])
def test_training_flags_stay(packed: bool) -> None:
    case = models.make("llama")
    case.model.train()
    case.model.layers[1].eval()
    before = {name: module.training for name, module in case.model.named_modules()}
    awq_ext.quantize(case.model, case.batches, packed=packed, **FAST)
    assert {name: module.training for name, module in case.model.named_modules()} == before


@pytest.mark.parametrize("packed", [True, False])
def test_requires_grad_and_identity_stay(packed: bool) -> None:
    case = models.make("layernorm")
    case.model.layers[0].norm.weight.requires_grad_(False)
    case.model.layers[1].up.bias.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in case.model.named_parameters()}
    awq_ext.quantize(case.model, case.batches, packed=packed, **FAST)
    for name, parameter in case.model.named_parameters():
        old, gradient = before[name]
        assert parameter.requires_grad == gradient, name
        assert parameter is old or (name.endswith(".weight") and not packed), name


@pytest.mark.parametrize("packed", [True, False])
def test_hooks_of_the_user_stay(packed: bool) -> None:
    case = models.make("llama")
    seen: list[str] = []
    for name, module in case.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    awq_ext.quantize(case.model, case.batches, packed=packed, **FAST)
    seen.clear()
    case.model(case.batches[0])
    assert sorted(seen) == sorted(name for name, m in case.model.named_modules() if not isinstance(m, nn.ModuleList))


def test_the_cache_is_off_in_calibration_and_as_it_was_afterwards() -> None:
    case = models.make("cache")
    case.model.calibrating = True
    awq_ext.quantize(case.model, case.batches, **FAST)
    assert case.model.config.use_cache is True
    case.model.config.use_cache = False
    case.model = models.make("cache").model
    case.model.config.use_cache = False
    awq_ext.quantize(case.model, case.batches, **FAST)
    assert case.model.config.use_cache is False


def test_a_model_that_writes_its_input_is_calibrated_on_the_input() -> None:
    """The model runs more than once on the first batch; a run must not see what an earlier one left in it."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            return self.inner(x)

    model = Doubling()
    weight = model.inner.weight.detach().clone()
    batches = [torch.randn(9, 24), torch.randn(30, 24)]
    rows = 2 * torch.cat(batches).double()
    awq_ext.quantize(model, batches, method="rtn", **FAST)
    error = (model.inner.weight - weight).double()
    direct = float((rows @ error.T).square().sum()) / len(rows)
    # second moments of 39 rows and products over 24 channels in fp32
    assert model.awq_report["inner"].loss == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_modes_stay_and_the_result_is_ordinary(mode: Any) -> None:
    """Quantized inside inference_mode, the layers must still be fit for training around them."""
    case = models.make("llama")
    with mode():
        before = (ThreadState.capture(), torch.is_inference_mode_enabled())
        awq_ext.quantize(case.model, case.batches, **FAST)
        assert (ThreadState.capture(), torch.is_inference_mode_enabled()) == before
    assert not any(t.is_inference() for t in case.model.state_dict().values())
    case.model(case.batches[0]).sum().backward()
    assert case.model.embed.weight.grad.abs().sum() > 0
    case.model.zero_grad()
    with torch.no_grad():
        case.model.embed.weight.mul_(0.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("tied", {"head": "int8", "method": "gptq", "generated_tokens": 0, "random_tokens": 0})],
)
def test_a_model_that_was_made_in_inference_mode(name: str, settings: dict[str, Any]) -> None:
    """Its parameters can be written in that mode alone, and nothing can be differentiated with them: all rows count alike."""
    expected = models.make(name)
    with torch.inference_mode():
        case = models.make(name)
    assert case.model.layers[0].input_norm.weight.is_inference()
    for one in (expected, case):
        one.model.layers[1].input_norm.requires_grad_(False)
        objective = {"objective": "layer"} if one is expected else {}
        awq_ext.quantize(one.model, one.batches, **settings, **objective, **FAST)
    flags = [{name: p.requires_grad for name, p in one.model.named_parameters()} for one in (expected, case)]
    assert flags[0] == flags[1]
    with torch.no_grad():
        assert torch.equal(case.model(case.batches[0]), expected.model(case.batches[0]))


class TalkativeNet(models.Net):
    """Each block returns more than its hidden states: a mask that it passes on, and a loss."""

    def __init__(self, more: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.more = more
        for layer in self.layers:
            layer.forward = partial(self._forward, layer.forward)

    def _forward(self, block: Callable[[Tensor], Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = block(given[0])
        return (x, *self.more(x))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        given = (self.embed(ids),)
        for layer in self.layers:
            given = layer(given)
        return self.lm_head(self.norm(given[0]))


def talkative(more: Callable[[Tensor], tuple[Tensor, ...]], **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model, batches = TalkativeNet(more).eval(), models.token_batches()
    return awq_ext.quantize(model, batches, method="awq", clip="auto", **settings, **FAST)


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_mask_that_blocks_return_changes_nothing(low: float, steps: int) -> None:
    plain = talkative(lambda x: (), learn_rounding=steps)
    model = talkative(lambda x: (torch.full((x.shape[1],) * 2, low).triu(1),), learn_rounding=steps)
    assert any(row.applied for row in plain.awq_report.layers)
    assert model.awq_report.to_dict()["blocks"] == plain.awq_report.to_dict()["blocks"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("steps", [0, 4])
def test_blocks_may_return_a_loss(steps: int) -> None:
    model = talkative(lambda x: (x.square().mean(), torch.zeros(())), learn_rounding=steps)
    assert all(0 < block.output_error < 1 for block in model.awq_report.blocks)


def test_a_linear_called_by_keyword_is_quantized_and_still_callable() -> None:
    case = models.make("keyword")
    awq_ext.quantize(case.model, case.batches, **FAST)
    assert isinstance(case.model.layers[0].up, QuantLinear)
    assert case.model(case.batches[0]).isfinite().all()


def test_a_linear_first_called_by_a_later_batch() -> None:
    """An expert that the first batch does not reach: quantized, or reported for what it is; never 'never called'."""

    class Block(models.MlpBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[1] < 20 else x + self.up(self.norm(x))[..., : x.shape[-1]]

    model = models.Net(Block)
    awq_ext.quantize(model, models.token_batches((30, 9, 24)), **FAST)
    row = model.awq_report["layers.0.down"]
    assert row.status == "int4" or "first" in row.note, row
    if row.status == "int4":
        assert row.tokens == 2 * 9


def test_an_expert_without_rows_is_rounded_and_named() -> None:
    class Block(models.MlpBlock):
        """``up`` is called, but on no row."""

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            self.up(h[:, :0])
            return x + self.down(torch.nn.functional.pad(h, (0, models.INNER - models.HIDDEN)))

    model = models.Net(Block)
    with pytest.warns(UserWarning, match="no calibration row") as caught:
        awq_ext.quantize(model, models.token_batches(), **FAST)
    assert [str(w.message) for w in caught] == [
        f"layers.{i}.up: no calibration row reached it; rounded to nearest instead" for i in range(3)
    ]
    row = model.awq_report["layers.0.up"]
    assert (row.status, row.method, row.tokens, row.loss) == ("int4", "rtn", 0, None)
    assert "no calibration row" in row.note


def test_transformer_encoder_layers_of_torch() -> None:
    """Their eval path reads weights around the modules; it must neither hide Linears from calibration nor break later."""
    layer = nn.TransformerEncoderLayer(40, 4, 72, batch_first=True, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 3).eval()
    original = copy.deepcopy(model)
    batches = [torch.randn(2, t, 40) for t in (7, 12)]
    awq_ext.quantize(model, batches, **FAST)
    names = [row.name for row in model.awq_report.layers if row.status == "int4"]
    assert names == [f"layers.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found, wanted = model(batches[0]), original(batches[0])
            assert (found - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_transformer_encoder_of_torch_takes_padded_batches() -> None:
    """In float it makes nested tensors of them, which are no inputs of a Linear."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(40, 4, 72, batch_first=True), 3).eval()
    original, padding = copy.deepcopy(model), torch.arange(9).expand(2, 9) >= torch.tensor([[9], [5]])
    batches = [{"src": torch.randn(2, 9, 40), "src_key_padding_mask": padding} for _ in range(3)]
    awq_ext.quantize(model, batches, **FAST)
    assert model.use_nested_tensor
    with torch.no_grad():
        found, wanted = model(**batches[0])[~padding], original(**batches[0])[~padding]
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_skip_patterns_and_given_blocks() -> None:
    case = models.make("llama")
    awq_ext.quantize(case.model, case.batches, blocks=[], skip=["*.mlp.*"], quantize_head=True, **FAST)
    report = case.model.awq_report
    assert [block.name for block in report.blocks] == [""]
    assert {row.name.split(".")[2] for row in report.layers if row.status == "int4" and "lm" not in row.name} == {
        "attention"
    }
    assert report["lm_head"].status == "int4"
    case = models.make("llama")
    awq_ext.quantize(case.model, case.batches, blocks=["layers.1.mlp"], **FAST)
    done = [row.name for row in case.model.awq_report.layers if row.status == "int4"]
    assert done == [f"layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert "never called" not in case.model.awq_report["layers.0.mlp.up_proj"].note


def test_progress_names_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    case = models.make("mlp")
    awq_ext.quantize(case.model, case.batches, **(FAST | {"progress": True}))
    shown = capsys.readouterr()
    assert "planned peak memory" in shown.out + shown.err
    assert "3/3" in shown.err
    awq_ext.quantize(models.make("mlp").model, case.batches, **FAST)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
