"""AwqReport: complete, printable, JSON and back."""

from __future__ import annotations

import json

import models
import pytest
import torch

import awq_ext
from awq_ext import AwqReport, BlockReport, LayerReport
from awq_ext.forwards.memory import PeakMemory, resident_bytes
from awq_ext.reporting.tables import format_bytes


def report() -> AwqReport:
    case = models.make("uncalled")
    return awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=4, progress=False).awq_report


def test_every_linear_has_one_row() -> None:
    found = report()
    wanted = {name for name, m in models.make("uncalled").model.named_modules() if type(m).__name__ == "Linear"}
    assert sorted(row.name for row in found.layers) == sorted(wanted)
    floats = {row.name: row.note for row in found.layers if row.status == "float"}
    assert floats.pop("lm_head") == "the output layer, by its name"
    assert list(floats) == [f"layers.{i}.unused" for i in range(3)]
    assert all("called" in note for note in floats.values())
    for row in found.layers:
        if row.status == "int4":
            assert row.tokens == 2 * (17 + 30 + 9 + 24)
            assert 0 < row.loss <= row.loss_rtn
            assert (row.in_features, row.out_features) in {(40, 72), (72, 40)}


def test_the_share_of_parameters() -> None:
    found = report()
    model = models.make("uncalled").model
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.quantized_parameters == 6 * models.HIDDEN * models.INNER
    assert found.share_quantized == found.quantized_parameters / found.parameters


def test_a_row_by_name() -> None:
    found = report()
    assert found["layers.1.up"].name == "layers.1.up"
    with pytest.raises(KeyError, match="nothing"):
        found["nothing"]


def test_json_round_trip() -> None:
    found = report()
    assert [block.name for block in found.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert AwqReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_table() -> None:
    found = report()
    found.warnings.append("something odd")
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["layer", "status", "scale", "alpha"]
    assert len(lines) == 1 + len(found.layers) + 2
    assert lines[-2] == found.summary()
    assert lines[-2].startswith("6 of 10 Linears quantized (")
    assert lines[-1] == "warning: something odd"
    up = next(line for line in lines if line.startswith("layers.0.up "))
    row = found["layers.0.up"]
    assert f"{row.loss / row.loss_rtn:.3f}" in up


def test_rows_without_a_loss_can_be_printed() -> None:
    rows = [
        LayerReport("a", 1, 1, "int4", loss=0.0, loss_rtn=0.0),
        LayerReport("b", 1, 1, "int4", note="its calibration input holds NaN or Inf"),
        LayerReport("c", 1, 1, "float"),
    ]
    text = str(AwqReport(layers=rows, blocks=[BlockReport("x")]))
    assert "0 / 0" in text
    assert "holds NaN" in text
    assert text.splitlines()[-1].startswith("2 of 3 Linears quantized (0.0% of all parameters), 0 with less")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_the_peak_is_that_since_the_mark() -> None:
    big = torch.ones(64 * 2**20, dtype=torch.uint8)
    held = resident_bytes()
    del big
    mark = PeakMemory(torch.device("cpu"))
    assert mark.start <= held
    assert mark.bytes() >= mark.start
    # more than the 32 MiB up to which glibc may take pages that are resident already
    more = torch.ones(64 * 2**20, dtype=torch.uint8)
    del more
    # the array is gone, its pages were counted
    assert mark.bytes() >= mark.start + 60 * 2**20
