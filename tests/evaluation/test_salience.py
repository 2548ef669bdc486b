"""salience(): the channels a model really sees, on calibration and on traffic, and what it warns of."""

from __future__ import annotations

import json
import warnings

import architectures
import models
import pytest
import torch
from architectures import Case
from checks import Snapshot
from torch import nn

import awq_ext
from awq_ext.calibration.channels import Agreement
from awq_ext.evaluation.salience import LayerSalience, salience
from awq_ext.forwards.calls import read_calls

QUIET = {"progress": False}


class Switched(nn.Module):
    """Blocks whose input has other loud channels for one kind of token (0 .. 9) than for the other (10 .. 19)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 200)
        with torch.no_grad():
            self.embed.weight[:10, :2] *= 50
            self.embed.weight[10:, 100:102] *= 50
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(200, 200), nn.Tanh()) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x


def tokens(low: int, high: int, count: int = 12) -> list[torch.Tensor]:
    return [torch.randint(low, high, (1, 32)) for _ in range(count)]


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_traffic_with_other_channels_is_named() -> None:
    model = Switched()
    with pytest.warns(UserWarning, match=r"not representative of 'other' in 2 groups: layers.0.0, layers.1.0"):
        found = salience(model, tokens(0, 10), {"same": tokens(0, 10), "other": tokens(10, 20)}, **QUIET)
    assert [row.layers for row in found.rows] == [("layers.0.0",), ("layers.1.0",)]
    for row in found.rows:
        assert row.traffic["same"].overlap == 1 and row.traffic["other"].overlap == 0
        assert row.traffic["other"].correlation < row.traffic["same"].correlation
        assert row.halves.overlap == 1
        assert 0.3 < row.top_share < 0.6  # 2 of 200 channels
    assert found.unlike("same") == [] and len(found.unlike("other")) == 2


@pytest.mark.filterwarnings("ignore")
def test_mixing_the_traffic_in_repairs_it() -> None:
    found = salience(Switched(), [*tokens(0, 10), *tokens(10, 20)], {"other": tokens(10, 20)}, **QUIET)
    assert found.unlike("other") == []


@pytest.mark.filterwarnings("ignore")
def test_the_means_are_those_quantize_uses(case: models.Case) -> None:
    found = salience(case.model, case.batches, **QUIET)
    groups = {row.layers for row in found.rows}
    seen: dict[str, list[torch.Tensor]] = {row.layers[0]: [] for row in found.rows}
    hooks = []
    for name, module in case.model.named_modules():
        if name in seen:
            keep = lambda _, args, kwargs, name=name: seen[name].append(  # noqa: E731
                (args[0] if args else kwargs["input"]).detach().float().flatten(0, -2).abs()
            )
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for batch in case.batches:
            case.model(batch.clone())
    for hook in hooks:
        hook.remove()
    for row in found.rows:
        rows = torch.cat(seen[row.layers[0]])
        torch.testing.assert_close(row.x_mean, rows.mean(0), rtol=1e-5, atol=1e-7)
        linears = [case.model.get_submodule(name) for name in row.layers]
        weight = torch.cat([linear.weight for linear in linears]).detach().abs().mean(0)
        torch.testing.assert_close(row.salience, row.x_mean * weight, rtol=1e-5, atol=1e-7)
        assert row.tokens == len(rows)
    awq_ext.quantize(case.model, case.batches, method="rtn", group_size=16, progress=False)
    assert groups == {tuple(r.name for r in case.model.awq_report.layers if r.group == g[0]) for g in groups}


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was(case: models.Case) -> None:
    snapshot = Snapshot(case.model)
    salience(case.model, case.batches, {"more": case.batches}, **QUIET)
    snapshot.assert_unchanged()
    with pytest.raises(awq_ext.CalibrationError):
        salience(case.model, case.batches, {"broken": [torch.zeros(2, 3, 3, 3)]}, **QUIET)
    snapshot.assert_unchanged()


def test_how_many_tokens_are_enough() -> None:
    """Four times the tolerance needs a sixteenth of the tokens; few and unlike batches draw a warning."""
    model = Switched()
    batches = [*tokens(0, 10, 2), *tokens(10, 20, 2)]
    with pytest.warns(UserWarning, match=r"128 tokens are few: about [\d,]+ would settle"):
        strict = salience(model, batches, tolerance=0.1, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loose = salience(model, batches, tolerance=0.4, **QUIET)
    assert strict.rows[0].enough_tokens == pytest.approx(16 * loose.rows[0].enough_tokens, rel=0.02)
    assert strict.enough_tokens > 128
    distances = [distance for _, distance in strict.rows[0].convergence]
    assert [count for count, _ in strict.rows[0].convergence] == [32, 64, 128]
    assert distances[0] > distances[-1] == 0
    one = salience(model, [torch.zeros(1, 32, dtype=torch.long)], **QUIET)
    assert one.enough_tokens is None and one.rows[0].halves is None


@pytest.mark.filterwarnings("ignore")
def test_every_form() -> None:
    found = salience(Switched(), tokens(0, 10), {"other": tokens(10, 20)}, **QUIET)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["rows"][0]["traffic"]["other"]["overlap"] == 0 and values["warnings"]
    text = str(found)
    assert "layers.0.0" in text and "warning: the calibration is not representative" in text
    assert "layers.0.0" in found._repr_html_()
    assert found["layers.1.0"] is found.rows[1]
    with pytest.raises(KeyError):
        found["embed"]


def test_settings_choose_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = salience(Switched(), tokens(0, 10), skip=("layers.0.*",), **QUIET)
    assert [row.layers for row in found.rows] == [("layers.1.0",)]


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"traffic": [1]}, TypeError), ({"tolerance": 0}, ValueError), ({"traffic": {"x": []}}, ValueError)],
)
def test_unusable_arguments(settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        salience(Switched(), tokens(0, 10), **settings, **QUIET)


MIXTURES = ["Mixtral", "Qwen2-MoE", "experts in a list"]


def mixture(name: str) -> Case:
    return architectures.make_or_skip(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_rows_of_their_own(name: str) -> None:
    """Each expert is seen with the rows that were routed to it; what the model computes and holds stays as it was."""
    made = mixture(name)
    snapshot = Snapshot(made.model)
    found = salience(made.model, made.batches, {"same": made.batches, "one": made.batches[:1]}, **QUIET)
    snapshot.assert_unchanged()
    first = [row for row in found.rows if any("0." in layer and ".experts." in layer for layer in row.layers)]
    wide = [row for row in first if len(row.x_mean) == architectures.HIDDEN]
    calls = read_calls(made.batches, torch.device("cpu"))
    tokens = sum(call.elements // (1 if name in architectures.TRANSFORMERS else architectures.HIDDEN) for call in calls)
    # two experts a token
    assert len(wide) >= 4 and sum(row.tokens for row in wide[:4]) == 2 * tokens
    assert all(row.traffic["same"].overlap == 1 for row in found.rows if row.tokens)
    assert found.unlike("same") == []
    # an expert needs rows of its own, and sees a share of the tokens
    most = max(row.tokens for row in found.rows)
    needed = sorted(row.enough_tokens * most / row.tokens for row in found.rows if row.enough_tokens)
    assert len([count for count in needed if count <= found.enough_tokens]) >= 0.9 * len(needed)
    assert found.enough_tokens <= needed[-1] + 1
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.filterwarnings("ignore")
def test_an_expert_that_the_calibration_never_chose_is_named() -> None:
    made = mixture("experts in a list")
    loud = torch.zeros(architectures.HIDDEN)
    loud[0] = 3.0
    gate = made.model[0].gate.weight
    with torch.no_grad():  # the loud channel decides: away from expert 3, or towards it
        gate[:, 0] = 0.0
        gate[3, 0] = -10.0
    away, towards = ([x + sign * loud for x in made.batches] for sign in (1, -1))
    found = salience(made.model, away, {"towards": towards}, **QUIET)
    row = found["0.experts.3.w1"]
    assert row.tokens == 0 and row.enough_tokens is None and row.halves is None
    assert "0.experts.3.w1" in [name for first in found.unlike("towards") for name in found[first].layers]
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("better", [0.9, 0.2])
def test_one_loud_channel_alone_is_no_reason_to_warn(better: float) -> None:
    """Narrow layers have a single top channel, which another sample replaces: all channels must agree less as well."""
    row = LayerSalience(
        layers=("a",),
        tokens=10,
        x_mean=torch.ones(4),
        salience=torch.ones(4),
        top_share=0.3,
        halves=Agreement(1.0, 0.5),
        enough_tokens=10,
        convergence=[],
        traffic={"x": Agreement(0.0, better)},
    )
    assert row.unlike("x") == (better < 0.5)
