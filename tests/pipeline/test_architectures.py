"""Every architecture of ``architectures.py``, without a table in the package: found, folded, quantized, saved and loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import SETTINGS, make_or_skip, quantized
from checks import same_bits
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import awq_ext
from awq_ext.folding.fold import Fold, NormFold
from awq_ext.folding.proof import prove_norm_fold
from awq_ext.forwards.inputs import tensor_identity
from awq_ext.forwards.probe import Probe
from awq_ext.modules import unwrapped
from awq_ext.reporting.report import AwqReport
from awq_ext.solving.solution import LayerSolution
from awq_ext.standins.standins import StandIns
from awq_ext.survey.groups import Watch
from awq_ext.survey.selection import eligible_linears

# A folded norm or row is rounded once more, and so is the column that makes up for it; a block does some tens of such
# operations one after another, each adding at most eps to the relative error of what it passes on.
BLOCK_BOUND = 32 * torch.finfo(torch.float32).eps
# At most six blocks and a head, each of which may pass on twice the relative error that it got.
MODEL_BOUND = 2.0**4 * BLOCK_BOUND

# Linears in the blocks that stay float, and why.
FLOAT: Mapping[str, Mapping[str, str]] = {
    "Mamba": {"*.mixer.dt_proj": "not called by the first calibration batch"},  # its weight is used by itself
    "torch.nn.TransformerEncoder": {"*.self_attn.out_proj": "not called by the first calibration batch"},  # as before
    "experts in a list": {"?.gate": "router of experts"},
    "Llama 4": {"*.router": "Llama4Router has a forward of its own"},
    "weight shared by two blocks": {"layers.[02].up": "its weight is shared with *"},
}
# Groups whose input no norm and no Linear's rows can be divided for: behind GELU; normed values that a residual reads too;
# values gated by what depends on the same rows; inputs of the block.
_BESIDE_ROUTER = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate", "experts.gate_up_proj.?")
_ROUTED = tuple(f"*.{name}" for name in _BESIDE_ROUTER)
RUN_TIME: Mapping[str, tuple[str, ...]] = {
    "OLMo2": ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"),
    "Phi": ("*.fc2",),
    "GPT-NeoX": ("*.dense_4h_to_h",),
    "Falcon, multi-query": ("*.dense_4h_to_h",),
    "Falcon, new decoder": ("*.dense_4h_to_h",),
    "BLOOM": ("*.dense_4h_to_h",),
    "MPT": ("*.ffn.down_proj",),
    "gpt-oss": ("*.down_proj.?",),
    # rows multiplied by what the router thinks of them; the router itself
    "Llama 4": ("*.gate_up_proj.?", "*.shared_expert.gate_proj", "*.shared_expert.up_proj"),
    # one of the Linears gains nothing from a scale in the norm
    "Qwen3-Next": tuple(f"model.layers.1.mlp.{name}" for name in _BESIDE_ROUTER),
    "GPT-2": ("*.mlp.c_proj",),
    "BERT": ("*.query", "*.key", "*.value", "*.intermediate.dense", "bert.encoder.layer.?.output.dense"),
    "T5": ("decoder.*.EncDecAttention.[kv]",),
    "ViT": ("*.fc2",),
    "Whisper": ("*.fc2", "*.encoder_attn.[kv]_proj"),
    "Mamba": ("*.x_proj", "*.out_proj"),
    "torch.nn.TransformerEncoder": ("*.linear1",),
    "convolutions": ("head.0",),
    "weight shared by two blocks": ("layers.[02].down",),
}

every_architecture = pytest.mark.parametrize("name", architectures.params())


def report_of(name: str, fold: str = "auto") -> AwqReport:
    return quantized(name, fold).model.awq_report


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors that ``model`` returns."""
    model.eval()
    result = model(**batch, use_cache=False) if _has_cache(model) else _call(model, batch)
    leaves = tree_leaves(dict(result) if isinstance(result, dict) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _has_cache(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "use_cache", None) is not None


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def matches(name: str, patterns: Any) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def names_of_linears(model: nn.Module) -> list[str]:
    """Linears, layers with a transposed weight, and one name for each expert of fused ones."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found.append(name)
        if type(module).__name__.endswith("Experts"):
            fused = [(leaf, p) for leaf, p in module._parameters.items() if p.dim() == 3]
            found += [f"{name}.{leaf}.{e}" for leaf, p in fused for e in range(len(p))]
    return found


@every_architecture
def test_every_linear_is_quantized_or_has_its_reason(name: str) -> None:
    report = report_of(name)
    model = unwrapped(make_or_skip(name).model)
    assert sorted(row.name for row in report.layers) == sorted(names_of_linears(model))
    blocks = [block.name for block in report.blocks]
    inside = [row for row in report.layers if any(not b or row.name.startswith(f"{b}.") for b in blocks)]
    assert inside
    reasons = FLOAT.get(name, {})
    for row in inside:
        expected = [reason for pattern, reason in reasons.items() if fnmatchcase(row.name, pattern)]
        assert row.status == ("float" if expected else "int4"), row
        assert not expected or fnmatchcase(row.note, expected[0])
        assert isinstance(quantized(name).model.get_submodule(row.name), awq_ext.QuantLinear) != bool(expected)
    assert all(row.note for row in report.layers if row.status == "float")
    assert not report.warnings


@every_architecture
def test_no_linear_is_worse_than_rounding_and_most_are_better(name: str) -> None:
    rows = [row for row in report_of(name).layers if row.status == "int4"]
    assert all(row.loss <= row.loss_rtn for row in rows)
    for leader in {row.group for row in rows}:
        members = [row for row in rows if row.group == leader]
        assert sum(row.loss for row in members) <= sum(row.loss_rtn for row in members)
    assert sum(row.loss < row.loss_rtn for row in rows) > len(rows) / 2
    assert all(row.tokens > 0 for row in rows)


@every_architecture
def test_all_that_can_be_folded_is(name: str) -> None:
    rows = report_of(name).layers
    at_run_time = RUN_TIME.get(name, ())
    for row in rows:
        assert (row.applied == "run time") == (row.scale in ("plain", "duo") and matches(row.name, at_run_time)), row
    assert all(any(fnmatchcase(row.name, pattern) for row in rows) for pattern in at_run_time)
    assert all(block.fold_error <= BLOCK_BOUND for block in report_of(name).blocks)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_usual_language_models_need_no_division_at_run_time(name: str) -> None:
    counts = architectures.fold_counts(report_of(name))
    scaled = counts["norm"] + counts["linear"] + counts["run time"]
    assert scaled >= 7
    assert counts["norm"] + counts["linear"] >= 0.95 * scaled


@every_architecture
def test_folded_float_weights_compute_what_the_model_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every step of the pipeline but the rounding to codes."""

    made = []

    def unrounded(layer: LayerSolution, fold: Fold | None) -> nn.Module:
        linear = layer.task.linear
        twin = nn.Linear(linear.in_features, linear.out_features, device="meta")
        weight = linear.weight.detach() * (1 if layer.scale is None else layer.scale)
        twin.weight = nn.Parameter(weight if layer.divisor is None else weight / layer.divisor[:, None])
        twin.bias = linear.bias
        scale = layer.scale if layer.scale is not None and fold is None else 1.0
        # a hook also keeps torch's encoder layer from reading the weight by itself
        twin.register_forward_pre_hook(lambda _, args: (args[0] / scale,))
        made.append(twin)
        return twin

    monkeypatch.setattr(importlib.import_module("awq_ext.pipeline.run"), "build_layer", unrounded)
    monkeypatch.setattr(StandIns, "put_back", lambda *_: None)  # would give float layers their own form back
    case = make_or_skip(name)
    before = [outputs(case.model, batch) for batch in case.batches]
    awq_ext.quantize(case.model, case.batches, bias_correction=False, **SETTINGS)
    assert made
    for old, batch in zip(before, case.batches, strict=True):
        for a, b in zip(old, outputs(case.model, batch), strict=True):
            assert (a - b).norm() <= MODEL_BOUND * a.norm()


@pytest.mark.parametrize("scale_of_experts", [1.0, 2.0**-3])  # two weights in a row: 2^-6 of the output
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Qwen2-MoE", "Qwen3-Next"])
def test_what_the_router_reads_is_divided_where_its_weight_can_make_up_for_it(
    name: str, dtype: torch.dtype, scale_of_experts: float
) -> None:
    """In half precision a router whose columns were multiplied would choose others, so the experts' rows are divided instead.

    A proof that allowed for half precision's roundings would not see experts of little weight (1 + w above all).
    """
    case = make_or_skip(name)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                parameter.mul_(scale_of_experts)
    routers = {
        n: p.detach().clone() for n, p in case.model.to(dtype).named_parameters() if n.endswith("mlp.gate.weight")
    }
    awq_ext.quantize(case.model, case.batches, **SETTINGS)
    rows = [row for row in case.model.awq_report.layers if matches(row.name, _ROUTED)]
    assert len(rows) == (3 + 4) * architectures.LAYERS
    places = ("norm", "run time", "") if dtype == torch.float32 else ("run time", "")
    assert all(row.applied in places for row in rows)
    assert any(row.applied == places[0] for row in rows)
    assert any(row.applied == "norm" for row in case.model.awq_report.layers)
    kept = [torch.equal(p, routers[n]) for n, p in case.model.named_parameters() if n in routers]
    assert len(kept) == architectures.LAYERS
    assert all(kept) == (dtype != torch.float32)


@every_architecture
def test_a_loaded_model_is_the_one_in_memory(name: str, tmp_path: Path) -> None:
    case = quantized(name)
    awq_ext.save(case.model, tmp_path / "saved")
    fresh = make_or_skip(name).model
    loaded = awq_ext.load(fresh, tmp_path / "saved")
    there, here = case.model.state_dict(), loaded.state_dict()
    assert there.keys() == here.keys()
    assert all(same_bits(tensor, here[key]) for key, tensor in there.items())
    old, new = outputs(case.model, case.batches[0]), outputs(loaded, case.batches[0])
    assert old
    assert all(a.isfinite().all() for a in old)
    assert all(same_bits(a, b) for a, b in zip(old, new, strict=True))


@every_architecture
def test_fold_always_divides_nothing_at_run_time(name: str) -> None:
    case = quantized(name, "always")
    layers = [module for module in case.model.modules() if isinstance(module, awq_ext.QuantLinear)]
    assert layers
    assert all(layer.pre_quant_scale is None for layer in layers)
    rows = case.model.awq_report.layers
    assert all(row.applied in ("norm", "linear", "") for row in rows)
    assert all(row.scale in ("identity", "") for row in rows if matches(row.name, RUN_TIME.get(name, ())))
    assert all(row.loss <= row.loss_rtn for row in rows if row.status == "int4")


def test_transposed_layers_keep_their_form_where_they_stay_float() -> None:
    case = make_or_skip("GPT-2")
    before = dict(case.model.named_modules())
    awq_ext.quantize(case.model, case.batches, skip=("*.attn.*", "lm_head"), **SETTINGS)
    for i in range(architectures.LAYERS):
        name = f"transformer.h.{i}.attn.c_attn"
        assert case.model.get_submodule(name) is before[name]
        assert case.model.awq_report[name].note == "skipped by pattern"
        assert case.model.awq_report[f"transformer.h.{i}.mlp.c_fc"].status == "int4"


def test_fake_quantized_transposed_layers_and_fused_experts_keep_their_form() -> None:
    for name in ("GPT-2", "gpt-oss", "Mixtral"):
        case = make_or_skip(name)
        state = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
        classes = [type(module) for module in case.model.modules()]
        awq_ext.quantize(case.model, case.batches, packed=False, bits=3, **SETTINGS)
        now = case.model.state_dict()
        assert list(now) == list(state)
        assert [type(module) for module in case.model.modules()] == classes
        changed = {key for key, tensor in now.items() if not torch.equal(tensor, state[key])}
        linears = {n.rstrip("0123456789").rstrip(".") for n in names_of_linears(case.model)} - {"lm_head"}
        wanted = {n if n in state else f"{n}.weight" for n in linears}
        wanted |= {f"{n}.bias" for n in linears if f"{n}.bias" in state}  # corrected; gpt-oss adds its biases elsewhere
        assert changed == wanted
        assert all(p.shape == state[n].shape for n, p in case.model.named_parameters())
        assert all(t.isfinite().all() for t in outputs(case.model, case.batches[0]))


class Rewritten(nn.Linear):
    """What nn.Linear does, in other words."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Clamped(nn.Linear):
    """A plain Linear but for large values."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-50, 50))


class Adapted(nn.Linear):
    """An adapter that does nothing yet."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.zeros(sizes[1]))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.extra


class Needy(nn.Linear):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return super().forward(input) * gate


class Bytes(nn.Linear):
    """Weights of a kind of its own, as 8-bit layers have."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(torch.zeros(sizes[::-1], dtype=torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_forward_of_its_own_that_computes_a_linear_is_one(dtype: torch.dtype) -> None:
    others = [Doubled(48, 32), Clamped(48, 32), Adapted(48, 32), Needy(48, 32)]
    model = nn.Sequential(Rewritten(48, 32), Rewritten(48, 32, bias=False), *others).to(dtype)
    model.append(Bytes(48, 32))
    found = eligible_linears(model, lambda *_: None)
    assert list(found.linears) == ["0", "1"]
    assert found.reasons == {
        str(i + 2): f"{type(m).__name__} has a forward of its own" for i, m in enumerate(model[2:])
    }


def test_views_of_one_tensor_are_one_input() -> None:
    x = torch.randn(2, 6, 8)
    same = [x.view(12, 8), x.flatten(0, 1), x.reshape(-1, 8), x[:, None], x.to(x.dtype), x.view(2, 6, 2, 4).flatten(2)]
    assert all(tensor_identity(view) == tensor_identity(x) for view in same)
    others = [x.clone(), x[:1], x[:, 1:], x.transpose(0, 1), x[1:], x.view(torch.int32)]
    assert all(tensor_identity(other) != tensor_identity(x) for other in others)
    before = tensor_identity(x)
    x += 1
    assert tensor_identity(x) != before


def test_linears_that_read_views_share_a_scale_and_a_norm() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.a, self.b, self.c = (nn.Linear(32, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.a(h) + self.b(h.flatten(0, 1)).view(*h.shape[:2], -1) + self.c(h[:, None])[:, 0]

    model = architectures.loud(nn.Sequential(Flat(), nn.ReLU()))
    awq_ext.quantize(model, [torch.randn(3, 5, 32) for _ in range(2)], **SETTINGS)
    rows = model.awq_report.layers
    assert [row.applied for row in rows] == ["norm"] * 3
    assert len({row.alpha for row in rows}) == 1


class HeadNorm(nn.Module):
    """One norm weight for every head, then a Linear over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(x).unflatten(-1, (4, 8))).flatten(-2))


def test_a_norm_of_each_head_folds_with_tied_scales() -> None:
    block = architectures.loud(HeadNorm())
    x = torch.randn(5, 16)

    @torch.no_grad()
    def run() -> Tensor:
        return block(x)

    probe = Probe(run, run())
    watch = Watch()
    with watch.on({"out": block.out}, {"norm": block.norm}):
        block(x)
        (group,) = watch.groups({"out": block.out})
    assert group.producer == "norm"
    fold = prove_norm_fold(probe, block.norm, [block.out])
    assert isinstance(fold, NormFold)
    scale = torch.rand(3, 32) + 0.5
    tied = fold.tie(scale)
    assert torch.equal(tied, tied[:, :8].repeat(1, 4))
    expected = scale.double().log().view(3, 4, 8).mean(1).exp()
    assert ((tied[:, :8] / expected - 1).abs() < 8 * torch.finfo(torch.float32).eps).all()
    effective = fold.effective_scale(tied[0])
    assert effective.shape == (32,)
    assert torch.equal(fold.changes(effective)[0][2](torch.ones(8)), 1 / effective[:8])


def test_a_norm_over_other_channels_than_the_linear_reads_is_no_producer() -> None:
    """BatchNorm over images: its weight has one entry a picture channel, the Linear reads lines."""

    class Lines(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(channels)
            self.line = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.norm(x))

    for channels in (3, 8, 16):
        model = architectures.loud(Lines(channels))
        awq_ext.quantize(model, [torch.randn(2, channels, 16, 16) for _ in range(2)], **SETTINGS)
        assert model.awq_report["line"].applied in ("run time", "")


def test_blocks_under_a_key_value_cache_are_run_on_copies_from_where_they_were() -> None:
    """Each run would add to the cache, and the next one attend to what it left."""
    pytest.importorskip("transformers", reason="transformers is not installed: its caches are not tested")
    from transformers import DynamicCache

    plain, cached = make_or_skip("Llama"), make_or_skip("Llama")
    awq_ext.quantize(plain.model, plain.batches, **SETTINGS)
    samples = [batch | {"past_key_values": DynamicCache(), "use_cache": True} for batch in cached.batches]
    awq_ext.quantize(cached.model, samples, **SETTINGS)
    here, there = plain.model.state_dict(), cached.model.state_dict()
    assert all(same_bits(tensor, there[key]) for key, tensor in here.items())
