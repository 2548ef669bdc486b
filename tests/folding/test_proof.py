"""Folding 1/s into norms: proven where it is right, refused where it is not; and what a fold then changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext.folding.fold import NormFold
from awq_ext.folding.proof import prove_norm_fold, prove_norm_folds
from awq_ext.forwards.probe import Probe, combined, substituted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def probe_of(block: nn.Module, dtype: torch.dtype = torch.float32) -> Probe:
    x = torch.randn(2, 7, models.HIDDEN).to(dtype)

    def run() -> Any:
        with torch.no_grad():
            return block(x.clone())

    return Probe(run, run())


def prove(block: nn.Module, norm: str, *linears: str, dtype: torch.dtype = torch.float32) -> NormFold | None:
    block.to(dtype)
    return prove_norm_fold(
        probe_of(block, dtype), block.get_submodule(norm), [block.get_submodule(name) for name in linears]
    )


def offset_norm() -> nn.Module:
    return models.Norm(offset=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norm", "kind"), [(models.Norm, "plain"), (models.layer_norm, "plain"), (offset_norm, "offset")]
)
def test_a_fold_is_proven(norm: Callable[[], nn.Module], kind: str, dtype: torch.dtype) -> None:
    fold = prove(models.MlpBlock(norm), "norm", "up", dtype=dtype)
    assert fold is not None
    assert fold.kind == kind
    block = models.LlamaBlock(norm)
    fold = prove(block, "input_norm", "attention.q_proj", "attention.k_proj", "attention.v_proj", dtype=dtype)
    assert fold is not None
    assert fold.kind == kind
    assert fold.module is block.input_norm


class Router(models.MlpBlock):
    """Part of the norm's output is read by an operation that is no Linear."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.up(h)) * torch.sigmoid(h.mean(-1, keepdim=True))


class Returned(models.MlpBlock):
    """The norm's output leaves the block beside its result."""

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        return x + self.down(self.up(h)), {"normed": h}


class Ignored(models.MlpBlock):
    """The norm has no effect on the output: nothing can be proven."""

    def forward(self, x: Tensor) -> Tensor:
        self.up(self.norm(x))
        return x


class Capped(models.MlpBlock):
    """Not linear between norm and Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x).clamp(-0.5, 0.5)))


class Squared(models.Norm):
    """A weight that acts in another way than a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [models.Norm, offset_norm], ids=["plain", "offset"])
@pytest.mark.parametrize("block", [models.TapBlock, Router, Returned, Ignored, Capped])
def test_a_fold_is_refused(block: type[models.MlpBlock], norm: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    assert prove(block(norm), "norm", "up", dtype=dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_refusals(dtype: torch.dtype) -> None:
    assert prove(models.MlpBlock(Squared), "norm", "up", dtype=dtype) is None
    # v is missing: it reads the divided input uncompensated
    assert prove(models.LlamaBlock(), "input_norm", "attention.q_proj", "attention.k_proj", dtype=dtype) is None
    nothing = models.MlpBlock()
    nn.init.zeros_(nothing.up.weight)
    assert prove(nothing, "norm", "up", dtype=dtype) is None


def test_norms_of_one_block_are_judged_each_for_itself() -> None:
    class Half(models.LlamaBlock):
        """The second norm's output is tapped, the first one's is not."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.input_norm(x))
            h = self.post_norm(x)
            return h + self.mlp(h)

    def kinds(block: models.LlamaBlock) -> list[str | None]:
        attention, mlp = block.attention, block.mlp
        readers = [(attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)]
        pairs = list(zip((block.input_norm, block.post_norm), readers, ((), ()), strict=True))
        return [fold and fold.kind for fold in prove_norm_folds(probe_of(block), pairs)]

    assert kinds(models.LlamaBlock()) == ["plain", "plain"]
    assert kinds(models.LlamaBlock(offset_norm)) == ["offset", "offset"]
    assert kinds(Half()) == ["plain", None]
    assert kinds(Half(offset_norm)) == ["offset", None]
    mixed = models.LlamaBlock()
    mixed.post_norm = offset_norm()
    assert kinds(mixed) == ["plain", "offset"]
    assert prove_norm_folds(probe_of(mixed), []) == []


def test_nan_in_the_block_is_no_proof() -> None:
    block = models.MlpBlock()
    with torch.no_grad():
        block.down.bias[0] = float("nan")
    assert prove(block, "norm", "up") is None


def test_substitutes_are_taken_back_after_an_error() -> None:
    block = models.MlpBlock()
    before = dict(block.up.named_parameters())
    with pytest.raises(ZeroDivisionError), substituted({(block.up, "weight"): torch.zeros(72, 40)}):
        assert not block.up.weight.any()
        raise ZeroDivisionError
    assert dict(block.up.named_parameters()) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "offset"])
def test_the_effective_scale_is_what_the_norm_divides_by(kind: str, dtype: torch.dtype) -> None:
    """old gain / new gain = effective scale, to the fp32 roundings on the way: of 1 + w twice, of the division, 2^-24 each.

    1 + w is rounded relative to 1, not to a gain far below it.
    """
    norm = models.Norm(1000, offset=kind == "offset").to(dtype)
    scale = torch.rand(1000) * 4 + 0.25
    fold = NormFold(norm, kind)
    offset = float(kind == "offset")
    old = norm.weight.detach().double() + offset
    new = combined(fold.changes(scale))[norm, "weight"]
    assert new.dtype == dtype
    effective = fold.effective_scale(scale)
    allowed = (old.abs() + offset * (1 + effective)) * 2.0**-23
    assert torch.all((effective.double() * (new.double() + offset) - old).abs() <= allowed)
    # rounding the new weight moved the scale by at most half an ulp of the weight (offset: of w, seen from 1 + w)
    spread = new.double().abs() if kind == "offset" else old.abs() / scale
    slack = torch.finfo(dtype).eps / 2 * spread / (old.abs() / scale) + 2.0**-21
    assert torch.all((effective / scale - 1).abs() <= slack * 1.01)
    if dtype != torch.float32:
        assert not torch.equal(effective, scale), "a rounded weight must show"


@pytest.mark.parametrize("kind", ["plain", "offset"])
def test_unusable_gains_keep_the_wanted_scale(kind: str) -> None:
    norm = models.Norm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1e-7, 1.0, 2.0]) - float(kind == "offset"))
    norm.to(torch.float16)
    scale = torch.tensor([3.0, 3.0, 3.0, 3.0])
    effective = NormFold(norm, kind).effective_scale(scale)
    assert torch.isfinite(effective).all()
    assert effective[0] == 3
    # 1/3 and 2/3 in fp16, and 1/3 - 1: half an ulp of at most 2^-11
    assert torch.all((effective[2:] / 3 - 1).abs() < 2.0**-9)


def test_the_bias_is_divided_too() -> None:
    norm = models.layer_norm()
    scale = torch.rand(models.HIDDEN) + 0.5
    divided = combined(NormFold(norm, "plain").changes(scale))
    assert torch.equal(divided[norm, "bias"], norm.bias.detach() / scale)
    assert torch.equal(divided[norm, "weight"], norm.weight.detach() / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "first", "folds"),
    [
        ("llama", "attention.q_proj", True),
        ("offset", "attention.q_proj", True),
        ("layernorm", "up", True),
        ("twice", "up", True),
        ("tap", "up", False),
        ("shared_norm", "up", False),
    ],
)
def test_quantize_folds_where_it_may(name: str, first: str, folds: bool, dtype: torch.dtype) -> None:
    case = models.make(name, dtype)
    norms = {n: p.detach().clone() for n, p in case.model.named_parameters() if "norm" in n}
    awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=5, progress=False)
    row = case.model.awq_report[f"layers.0.{first}"]
    assert row.scale != "identity"
    assert row.applied == ("norm" if folds else "run time")
    assert (case.model.get_submodule(row.name).pre_quant_scale is None) == folds
    changed = [n for n, p in case.model.named_parameters() if n in norms and not torch.equal(p, norms[n])]
    assert all(n.startswith("layers.") for n in changed)
    assert any(n.startswith("layers.0.") for n in changed) == folds
    for block in case.model.awq_report.blocks:
        # the folded float block differs by roundings alone: some tens of them, of norm, products and residuals
        assert block.fold_error <= 32 * torch.finfo(dtype).eps


def test_fold_never_leaves_the_norms() -> None:
    case = models.make("llama")
    norms = {n: p.detach().clone() for n, p in case.model.named_parameters() if "norm" in n}
    awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=5, fold="never", progress=False)
    assert {row.applied for row in case.model.awq_report.layers} == {"run time", ""}
    assert all(torch.equal(p, norms[n]) for n, p in case.model.named_parameters() if n in norms)


def test_a_producer_that_is_only_rounded_still_takes_the_scale() -> None:
    """Its own input cannot guide a search (the square of a value overflows), that of the Linear behind it can."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 24)
            with torch.no_grad():
                self.fc1.weight[:, 0] = 0
                self.fc1.weight[:4] *= 30  # loud channels for fc2

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    model = Loud()
    x = torch.randn(64, 16)
    x[:, 0] = 1e20
    expected = model(x).detach()
    with pytest.warns(UserWarning, match="fc1: its calibration input holds NaN or Inf"):
        awq_ext.quantize(model, [x], group_size=16, progress=False)
    assert model.awq_report["fc2"].applied == "linear"
    # 4 bits: steps of a fifteenth of the range, errors of a few percent; a scale that only one side knows is off by far more
    assert (model(x) - expected).norm() < 0.15 * expected.norm()
