"""Padding in batches for mixtures of experts: not a row of it counts in what their Linears are quantized by."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
from architectures import HIDDEN, ExpertList
from checks import hook_count
from mixtures import surveyed, two_layers
from torch import Tensor, nn

import awq_ext
from awq_ext.calibration.statistics import collect
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import lockstep

SETTINGS = {"group_size": 16, "n_grid": 4, "min_tokens": 1, "progress": False}
MIXTURES = ["Mixtral", "Qwen2-MoE", "DeepSeek-V2", "gpt-oss", "Llama 4", "experts in a list"]


class Masked(nn.Sequential):
    """Blocks behind one another, called as transformers' models are."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def masked(model: nn.Module) -> Masked:
    return architectures.loud(Masked(*model.children()))


def padded(samples: list[Tensor], left: bool = False) -> dict[str, Tensor]:
    """Samples [T, K] of different lengths in one batch, padded with rows that are loud and all different."""
    longest = max(map(len, samples))
    rows = [torch.randn(longest - len(s), HIDDEN) * 50 for s in samples]
    pairs = [(pad, s) if left else (s, pad) for pad, s in zip(rows, samples, strict=True)]
    marks = [
        (torch.zeros(len(a)), torch.ones(len(b))) if left else (torch.ones(len(a)), torch.zeros(len(b)))
        for a, b in pairs
    ]
    return {
        "x": torch.stack([torch.cat(pair) for pair in pairs]),
        "attention_mask": torch.stack([torch.cat(m) for m in marks]),
    }


def statistics_of(model: nn.Module, calls: list[Call]) -> dict[str, Any]:
    found = surveyed(model, calls)
    made = {}
    with torch.no_grad(), lockstep(model, [s.block for s in found], calls) as visits:
        for one, (_, stops) in zip(found, visits, strict=True):
            groups, _ = collect(one, stops, torch.device("cpu"), one is found[-1])
            made |= {name: group.inputs[name] for group in groups for name in group.inputs}
    assert hook_count(model) == 0
    return made


@pytest.mark.parametrize("left", [False, True])
def test_statistics_are_those_of_the_rows_without_padding(left: bool) -> None:
    model = masked(two_layers())
    samples = [torch.randn(t, HIDDEN) for t in (20, 7, 13, 20, 3, 16)]
    expected = statistics_of(model, [Call((s[None],)) for s in samples])
    found = statistics_of(model, [Call(kwargs=padded(samples[:3], left)), Call(kwargs=padded(samples[3:], left))])
    assert found.keys() == expected.keys()
    assert sum(".experts." in name for name in found) == 24
    for name, one in found.items():
        assert one.rows == expected[name].rows, name
        if ".experts." in name:
            assert one.rows_seen == expected[name].rows_seen
        exact = expected[name].stats.abs_sum()
        torch.testing.assert_close(one.stats.abs_sum(), exact, rtol=1e-6, atol=0)
        moment, other = one.stats.second_moment(), expected[name].stats.second_moment()
        size = other.diagonal().sqrt()
        assert ((moment - other).abs() <= 79 * 2.0**-24 * size[:, None] * size).all()  # sums of 79 products in fp32


def test_rows_of_equal_bits_are_counted_as_often_as_tokens_have_them() -> None:
    model = masked(two_layers())
    row = torch.randn(HIDDEN)
    sample = torch.cat([torch.randn(6, HIDDEN), row.expand(3, -1)])
    batch = torch.stack([sample, torch.cat([sample[:4], row.expand(5, -1)])])
    mask = torch.ones(2, 9)
    mask[1, 4:] = 0
    expected = statistics_of(model, [Call((sample[None],)), Call((sample[None, :4],))])
    found = statistics_of(model, [Call(kwargs={"x": batch, "attention_mask": mask})])
    assert {name: one.rows for name, one in found.items()} == {name: one.rows for name, one in expected.items()}
    for name, one in found.items():
        torch.testing.assert_close(one.stats.abs_sum(), expected[name].stats.abs_sum(), rtol=1e-4, atol=1e-4)


def test_an_expert_that_only_padding_chose_is_one_that_no_token_chose() -> None:
    model = masked(two_layers())
    batch = torch.randn(2, 12, HIDDEN)
    with torch.no_grad():  # expert 2 is for rows whose channel 0 is loud, and none but for them
        model[0].gate.weight[:, 0] = 0.0
        model[0].gate.weight[2, 0] = 100.0
        model[0].norm.weight[0] = 1.0
    batch[..., 0] = -30.0
    mask = torch.ones(2, 12)
    mask[:, 8:] = 0
    batch[:, 8:, 0] = 30.0
    with pytest.warns(UserWarning, match="rounded to nearest") as seen:
        awq_ext.quantize(model, [{"x": batch, "attention_mask": mask}], **SETTINGS)
    assert "0.experts.2.w1 (0), 0.experts.2.w3 (0), 0.experts.2.w2 (0): " in str(seen[0].message)
    assert model.awq_report["0.experts.2.w1"].tokens == 0
    assert model.awq_report["0.experts.2.w1"].note == "no calibration row reached it"
    assert sum(model.awq_report[f"0.experts.{e}.w1"].tokens for e in range(4)) == 16 * 2


class Halved(ExpertList):
    """What its experts read are no rows of any tensor that a mask fits."""

    def forward(self, x: Tensor) -> Tensor:
        hooks = [e.register_forward_pre_hook(lambda _, args: (args[0] / 2,)) for e in self.experts]
        try:
            return super().forward(x)
        finally:
            for hook in hooks:
                hook.remove()


def test_where_rows_cannot_be_told_apart_a_warning_says_so() -> None:
    model = masked(nn.Sequential(Halved(), Halved()))
    batch = padded([torch.randn(t, HIDDEN) for t in (30, 24)])
    with pytest.warns(
        UserWarning, match=r"0\.experts\.0\.w1 and 15 more: .*not seen from attention_mask.*padding counts"
    ):
        awq_ext.quantize(model, [batch], **SETTINGS)
    whole = masked(nn.Sequential(Halved(), Halved()))
    awq_ext.quantize(whole, [{"x": batch["x"], "attention_mask": torch.ones(2, 30)}], **SETTINGS)
    assert not whole.awq_report.warnings


@pytest.mark.parametrize("name", MIXTURES)
def test_padded_batches_count_the_rows_of_the_samples_alone(name: str) -> None:
    reports = []
    for pad in (False, True):
        case = architectures.make_or_skip(name)
        if name == "experts in a list":
            case.model = masked(case.model)
            samples = [torch.randn(t, HIDDEN, generator=torch.Generator().manual_seed(t)) for t in (16, 5, 11)]
            calls = [padded(samples)] if pad else [{"x": s[None]} for s in samples]
        else:
            ids = [sample["input_ids"][0, :t] for sample, t in zip(case.batches, (16, 5, 11), strict=True)]
            mask = torch.tensor([[1] * len(i) + [0] * (16 - len(i)) for i in ids])
            rows = torch.stack([torch.cat([i, i.new_full((16 - len(i),), 7)]) for i in ids])
            calls = [{"input_ids": rows, "attention_mask": mask}] if pad else [{"input_ids": i[None]} for i in ids]
        reports.append(awq_ext.quantize(case.model, calls, **SETTINGS).awq_report)
    alone, together = reports
    experts = [row.name for row in alone.layers if "experts." in row.name and row.status == "int4"]
    assert experts
    for each in experts:
        assert together[each].tokens == alone[each].tokens, each
        assert together[each].loss_rtn == pytest.approx(alone[each].loss_rtn, rel=1e-3)
