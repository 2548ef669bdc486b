"""Which Linears share an input, which norm makes it, which of them can be quantized at all."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

from awq_ext import QuantLinear
from awq_ext.forwards.inputs import tensor_identity
from awq_ext.modules import norm_candidates
from awq_ext.survey.groups import Watch
from awq_ext.survey.selection import eligible_linears


def never(*_: object) -> None:
    """No reason to leave any layer out."""


def groups_of(block: nn.Module, x: Tensor) -> dict[tuple[str, ...], str | None]:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    watch = Watch()
    with watch.on(linears, norm_candidates(block)), torch.no_grad():
        block(x)
    return {group.linears: group.producer for group in watch.groups(linears)}


def hidden() -> Tensor:
    return torch.randn(2, 5, models.HIDDEN)


def test_a_llama_block() -> None:
    assert groups_of(models.LlamaBlock(), hidden()) == {
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"): "input_norm",
        ("attention.o_proj",): None,
        ("mlp.gate_proj", "mlp.up_proj"): "post_norm",
        ("mlp.down_proj",): None,
    }


@pytest.mark.parametrize("block", [models.TwiceBlock, models.TapBlock, models.KeywordBlock])
def test_blocks_that_call_in_other_ways(block: type[nn.Module]) -> None:
    assert groups_of(block(), hidden()) == {("up",): "norm", ("down",): None}


def test_a_linear_never_called_is_in_no_group() -> None:
    assert groups_of(models.UncalledBlock(), hidden()) == {("up",): "norm", ("down",): None}


def test_equal_values_in_other_memory_are_another_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone()) + self.c(x)

    assert groups_of(Two(), torch.randn(2, 4)) == {("a", "c"): None, ("b",): None}


def test_a_tensor_changed_in_between_is_another_input() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = models.Norm(4)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            y = self.a(h)
            h.add_(1)
            return y + self.b(h)

    assert groups_of(Changed(), torch.randn(2, 4)) == {("a",): "norm", ("b",): None}


def test_freed_memory_is_not_taken_for_the_input_it_held() -> None:
    """The allocator gives the second input the address of the first; they are two inputs all the same."""

    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            y = self.a(h)
            del h
            h = x * 3
            return y + self.b(h)

    assert groups_of(Reuse(), torch.randn(9, 64)) == {("a",): None, ("b",): None}


def test_the_same_linears_called_with_different_partners_are_apart() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.b(x))

    assert groups_of(Cross(), torch.randn(2, 4)) == {("a",): None, ("b",): None}


def test_identity_of_tensors() -> None:
    x = torch.zeros(4, 4)
    assert tensor_identity(x) == tensor_identity(x.detach())
    assert tensor_identity(x) == tensor_identity(x.view(4, 4))
    assert tensor_identity(x) != tensor_identity(x.t())
    assert tensor_identity(x) != tensor_identity(x[1:])
    assert tensor_identity(x) != tensor_identity(x.view(torch.int32))
    before = tensor_identity(x)
    x.add_(1)
    assert tensor_identity(x) != before
    with torch.inference_mode():
        y = torch.zeros(3)
        assert tensor_identity(y) == tensor_identity(y)


def test_norm_candidates() -> None:
    block = models.LlamaBlock()
    assert list(norm_candidates(block)) == ["input_norm", "post_norm"]
    holder = nn.ModuleDict(
        {
            "ln": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
            "wide": nn.LayerNorm((2, 4)),
            "bare": nn.LayerNorm(4, elementwise_affine=False),
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(4, 4),
        }
    )
    assert list(norm_candidates(holder)) == ["ln", "rms"]


def test_eligible_linears_of_a_model() -> None:
    skipped = ("lm_head", "k_proj")
    found = eligible_linears(models.Net(), lambda name, _: "skipped by pattern" if name.endswith(skipped) else None)
    assert len(found.linears) == 18
    assert found.reasons == dict.fromkeys(
        ["layers.0.attention.k_proj", "layers.1.attention.k_proj", "layers.2.attention.k_proj", "lm_head"],
        "skipped by pattern",
    )


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_reasons_to_leave_a_linear() -> None:
    embedding, tied, bad = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = embedding.weight
    with torch.no_grad():
        bad.weight[1, 2] = float("nan")
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twice = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "own": OwnForward(4, 4),
            "parametrized": parametrized,
            "bad": bad,
            "one": twice,
            "two": twice,
            "good": nn.Linear(4, 4),
        }
    )
    found = eligible_linears(model, never)
    assert list(found.linears) == ["good"]
    assert found.reasons == {
        "tied": "its weight is shared with embedding.weight",
        "own": "OwnForward has a forward of its own",
        "parametrized": "its weight is computed by a parametrization",
        "bad": "its weight holds NaN or Inf",
        "one": "its weight is shared with two.weight",
        "two": "its weight is shared with one.weight",
    }


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (QuantLinear(4, 4, -1), "x is a QuantLinear already"),
        (nn.Linear(4, 4, device="meta"), "x.weight is on the meta device"),
        (nn.Linear(4, 4, dtype=torch.float64), "x.weight is torch.float64: float32, bfloat16 or float16"),
    ],
)
def test_models_that_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eligible_linears(nn.ModuleDict({"x": module}), never)


def test_integer_weights_are_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"x\.weight is torch\.int8"):
        eligible_linears(nn.ModuleDict({"x": linear}), never)
