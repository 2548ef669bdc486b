"""Wrong input: a clear error that names what is wrong, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from torch import Tensor, nn

import awq_ext
from awq_ext import AwqConfig, CalibrationError, QuantLinear

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}


def refused(model: nn.Module, loader: Any, error: Any, match: str, **options: Any) -> None:
    """quantize() raises ``error`` with ``match`` in its message, and the model is as it was."""
    before = Snapshot(model)
    with pytest.raises(error, match=match) as caught:
        awq_ext.quantize(model, loader, **(FAST | options))
    caught.value.__traceback__ = None
    before.assert_unchanged()


@pytest.fixture
def llama() -> models.Case:
    case = models.make("llama")
    case.model.layers[0].train()
    return case


@pytest.mark.fault(
    "Calls of quantize", "The loader has no samples, or can be read only once", "ValueError; the model stays as it was"
)
def test_an_empty_loader(llama: models.Case) -> None:
    refused(llama.model, [], ValueError, "calib_loader is empty")
    refused(llama.model, iter([]), ValueError, "can be read only once")


@pytest.mark.fault(
    "Calls of quantize", "The loader raises an error of its own midway", "That very error; the model stays as it was"
)
def test_a_loader_that_raises_midway(llama: models.Case) -> None:
    def loader() -> Iterator[Tensor]:
        yield llama.batches[0]
        raise OSError("disk gone")

    refused(llama.model, loader(), OSError, "disk gone")


@pytest.mark.fault("Calls of quantize", "Ctrl-C while the loader works", "KeyboardInterrupt; the model stays as it was")
def test_an_interrupt_in_the_loader(llama: models.Case) -> None:
    def loader() -> Iterator[Tensor]:
        yield llama.batches[0]
        raise KeyboardInterrupt("on purpose")

    refused(llama.model, loader(), KeyboardInterrupt, "on purpose")


@pytest.mark.fault(
    "Calls of quantize",
    "`quantize` is called with {options}",
    "An error that names the value; the model stays as it was",
)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"group_size": 64.0}, TypeError, "group_size=64.0"),
        ({"group_size": "64"}, TypeError, "group_size='64'"),
        ({"bits": 5}, ValueError, "bits=5"),
        ({"method": "magic"}, ValueError, "method='magic'"),
        ({"group_sise": 4}, TypeError, "group_sise=4.: did you mean group_size?"),
        ({"inputs": "last"}, TypeError, "inputs='last'"),
        ({"blocks": ["layers.7"]}, (ValueError, TypeError), "layers.7"),
        ({"blocks": "layers.0"}, (ValueError, TypeError), "blocks"),
        ({"blocks": ["layers"]}, (ValueError, CalibrationError), "layers"),
        ({"blocks": ["layers.0", "layers.0.mlp"]}, ValueError, r"layers\.0\.mlp"),
        ({"blocks": ["layers.0", "layers.0"]}, ValueError, r"layers\.0"),
    ],
)
def test_bad_settings(llama: models.Case, options: dict[str, Any], error: Any, match: str) -> None:
    refused(llama.model, llama.batches, error, match, **options)


@pytest.mark.fault(
    "Calls of quantize",
    "The name of a file is given in place of its text",
    "TypeError that says how to read it; the model stays as it was",
)
def test_the_name_of_a_file_is_no_text(llama: models.Case, tmp_path: Path) -> None:
    (file := tmp_path / "calib.txt").write_text("some text")
    says = r"calib\.txt.*is the name of a file, not its text: read it first, \[pathlib\.Path\('"
    for loader in (str(file), file, [str(file)], [file]):
        refused(llama.model, loader, TypeError, says, tokenizer=lambda text: [1, 2, 3])
    with pytest.raises(TypeError, match=says):
        awq_ext.evaluate(llama.model, [str(file)], tokenizer=lambda text: [1, 2, 3])


@pytest.mark.fault("Calls of quantize", "config= is no configuration", "TypeError; the model stays as it was")
def test_a_config_that_is_no_config(llama: models.Case) -> None:
    refused(llama.model, llama.batches, TypeError, "AwqConfig", config=["bits"])
    assert AwqConfig(**{k: v for k, v in FAST.items() if k != "progress"}).n_grid == 2


@pytest.mark.fault(
    "Calls of quantize",
    "The model has no Linears, or weights that are integers, float64 or on the meta device",
    "ValueError that names the weight; the model stays as it was",
)
def test_models_that_cannot_be_quantized(llama: models.Case) -> None:
    refused(nn.Sequential(nn.Conv1d(3, 3, 1)), [torch.ones(1, 3, 5)], ValueError, "no nn.Linear")
    refused(llama.model, llama.batches, ValueError, "no Linear is left to quantize: .*skipped by pattern", skip=["*"])
    with torch.device("meta"):
        model = models.Net()
    refused(model, llama.batches, ValueError, "layers.0.attention.q_proj.weight is on the meta device")
    integers = models.Net()
    integers.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(72, 40, dtype=torch.int8), requires_grad=False)
    refused(integers, llama.batches, ValueError, r"layers\.1\.mlp\.up_proj\.weight is torch\.int8")
    refused(models.Net().double(), llama.batches, ValueError, r"q_proj\.weight is torch\.float64")


@pytest.mark.fault("Calls of quantize", "The model is a single Linear", "ValueError; the model stays as it was")
def test_a_bare_linear_has_no_place_to_put_the_new_layer() -> None:
    refused(nn.Linear(16, 4), [torch.randn(3, 16)], ValueError, "Linear")


@pytest.mark.fault(
    "Calls of quantize", "The model is quantized already", "ValueError that names the layer; the model stays as it was"
)
def test_a_model_that_is_quantized_already(llama: models.Case) -> None:
    awq_ext.quantize(llama.model, llama.batches, **FAST)
    refused(llama.model, llama.batches, ValueError, r"layers\.0\.attention\.q_proj is a QuantLinear already")


@pytest.mark.fault(
    "Calls of quantize", "attention_mask leaves no row of the samples", "ValueError; the model stays as it was"
)
def test_all_rows_masked_out(llama: models.Case) -> None:
    ids = llama.batches[0]
    masked = {"ids": ids, "attention_mask": torch.zeros_like(ids)}
    refused(llama.model, [masked, masked], ValueError, r"all 68 calibration rows are masked out.*attention_mask")


@pytest.mark.fault(
    "Calls of quantize",
    "The model rejects batch {position}, calibrating with propagate={propagate}",
    "CalibrationError with the number and the shapes of the batch; the model stays as it was",
)
@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_batch_that_the_model_rejects(llama: models.Case, position: int, propagate: str) -> None:
    batches = list(llama.batches)
    batches.insert(position, torch.full((1, 3), 1000))
    match = rf"batch {position} \(tensor shapes \[\(1, 3\)\]\): IndexError"
    refused(llama.model, batches, CalibrationError, match, propagate=propagate)


@pytest.mark.fault(
    "Calls of quantize",
    "The loader gives (input, label) pairs",
    'CalibrationError that names inputs="first"; the model stays as it was',
)
def test_pairs_without_saying_so() -> None:
    case = models.make("mlp")
    pairs = [(batch, torch.zeros(2)) for batch in case.batches]
    refused(case.model, pairs, CalibrationError, 'inputs="first"')
    awq_ext.quantize(case.model, pairs, inputs="first", **FAST)


@pytest.mark.fault("Calls of quantize", "The forward calls no Linear", "CalibrationError; the model stays as it was")
def test_no_linear_is_reached(llama: models.Case) -> None:
    class Skipping(models.Net):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.embed(ids)

    refused(Skipping(), llama.batches, CalibrationError, "reached no Linear")


@pytest.mark.fault(
    "Calls of quantize", "A calibration sample holds NaN", "ValueError that names the sample and the argument"
)
def test_samples_that_hold_nan() -> None:
    """Inf may be there: masks of floats have it."""

    class Parts(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(32, 8))

        def forward(self, parts: list[Tensor]) -> Tensor:
            return self[0](torch.cat(parts))

    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU())
    before, batches = model[0].weight.clone(), [torch.randn(50, 32) for _ in range(3)]
    batches[2][7, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"^sample 2 of calib_loader holds NaN \(argument 0, of shape \(50, 32\)\): leave"
    ):
        awq_ext.quantize(model, batches, **FAST)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"^sample 0 of calib_loader holds NaN \(parts, of shape \(50, 32\)\)"):
        awq_ext.quantize(Parts(), [{"parts": [batches[0], batches[2]]}], **FAST)
    transformer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    awq_ext.quantize(transformer, [{"src": torch.randn(2, 5, 32), "src_mask": mask}], **FAST)


# --- NaN and Inf: the layer is named and rounded to nearest, or left; the others are not touched by it -------------------


@pytest.mark.fault(
    "Calls of quantize",
    "Activations of a layer hold {value}",
    "A warning names the layer, which is rounded to nearest; all others are as without it",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_bad_activations(value: float, propagate: str) -> None:
    case = models.make("llama")
    mlp = case.model.layers[1].mlp

    def spoil(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, 1, 3] = value
        return changed

    mlp.up_proj.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="NaN or Inf") as caught:
        awq_ext.quantize(case.model, case.batches, propagate=propagate, **FAST)
    report = case.model.awq_report
    messages = "\n".join(str(w.message) for w in caught)
    assert report.warnings == [str(w.message) for w in caught]
    row = report["layers.1.mlp.down_proj"]
    assert (row.status, row.method, row.scale, row.loss) == ("int4", "rtn", "identity", None)
    assert row.name in messages
    assert "holds NaN or Inf" in row.note
    for name in ("layers.0.mlp.down_proj", "layers.1.mlp.up_proj", "layers.1.attention.q_proj"):
        assert report[name].note == ""
        assert report[name].loss < report[name].loss_rtn
        assert name not in messages


@pytest.mark.fault(
    "Calls of quantize",
    "Activations are so large that their squares overflow",
    "A warning names the layer; all weights stay finite",
)
def test_activations_whose_squares_overflow() -> None:
    case = models.make("mlp")
    with pytest.warns(UserWarning, match="calibration input") as caught:
        awq_ext.quantize(case.model, [batch * 1e22 for batch in case.batches], **FAST)
    assert str(caught[0].message).startswith("0.0: its calibration input")
    for row in case.model.awq_report.layers:
        assert row.status == "int4"
        assert row.loss is None or row.loss <= row.loss_rtn < float("inf")
        assert case.model.get_submodule(row.name).weight.isfinite().all()


@pytest.mark.fault("Calls of quantize", "A weight holds {value}", "This layer stays float, and the report names it")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_stay_as_they_are_and_are_named(value: float) -> None:
    case = models.make("llama")
    bad = case.model.layers[2].mlp.down_proj
    with torch.no_grad():
        bad.weight[3, 5] = value
    awq_ext.quantize(case.model, case.batches, **FAST)
    report = case.model.awq_report
    assert case.model.layers[2].mlp.down_proj is bad
    assert (report["layers.2.mlp.down_proj"].status, report["layers.2.mlp.down_proj"].note) == (
        "float",
        "its weight holds NaN or Inf",
    )
    assert isinstance(case.model.layers[1].mlp.down_proj, QuantLinear)
    for row in report.layers:
        if row.status == "int4" and row.loss is not None:
            assert row.loss <= row.loss_rtn


@pytest.mark.fault(
    "Calls of quantize",
    "A NaN in a weight spoils the layers behind it",
    "Warnings name them; they are rounded to nearest",
)
def test_bad_weights_that_spoil_what_follows_are_warned_of() -> None:
    case = models.make("llama")
    with torch.no_grad():
        case.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.warns(UserWarning) as caught:
        awq_ext.quantize(case.model, case.batches, **FAST)
    named = "\n".join(str(w.message) for w in caught)
    for name in ("layers.1.attention.q_proj", "layers.2.mlp.down_proj"):
        assert name in named
        assert case.model.awq_report[name].method == "rtn"


@pytest.mark.fault("Calls of quantize", "Weights are constant or zero", "They are quantized exactly, or nearly so")
def test_constant_and_zero_weights() -> None:
    case = models.make("llama")
    with torch.no_grad():
        case.model.layers[0].mlp.up_proj.weight.zero_()
        case.model.layers[0].mlp.gate_proj.weight.fill_(0.25)
    awq_ext.quantize(case.model, case.batches, fold="never", **FAST)
    # 0.25 is a power of two, so exact in any scale type; s and 1/s are two fp32 roundings
    torch.testing.assert_close(
        case.model.layers[0].mlp.gate_proj.weight, torch.full((72, 40), 0.25), rtol=2.0**-10, atol=0
    )
    assert not case.model.layers[0].mlp.up_proj.weight.any()
    for row in case.model.awq_report.layers[:-1]:
        assert row.loss <= row.loss_rtn


@pytest.mark.fault("Calls of quantize", "A channel is never active", "It does not disturb the others")
def test_dead_channels() -> None:
    """Channels that are never active get s = 1, and weights there do not disturb the others."""
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:, 5] = 1e4
    x = torch.randn(50, 32)
    x[:, 5] = 0
    awq_ext.quantize(model, [x], **FAST)
    row = model.awq_report["0"]
    assert 0 < row.loss <= row.loss_rtn
    if model[0].pre_quant_scale is not None:
        assert model[0].pre_quant_scale[5] == 1
