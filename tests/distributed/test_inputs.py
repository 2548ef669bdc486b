"""Rows on their way to the process that adds them up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from awq_ext.calibration.statistics import Rows
from awq_ext.distributed.inputs import InputRecord, unpacked

CPU = torch.device("cpu")


def test_rows_arrive_in_the_order_of_their_calls() -> None:
    record = InputRecord()
    mask, weights = torch.tensor([True, False]), torch.tensor([0.5, 2.0])
    record.take("b", Rows(torch.ones(2, 3), mask, weights, 2))
    record.take("a", Rows(torch.zeros(1, 3), None, None, 1))
    record.take("b", Rows(torch.full((1, 3), 7.0), None, None, 1))
    rows, padded = unpacked(record.packed({"b"}), CPU)
    found = list(rows)
    assert padded == ["b"]
    assert [(name, one.seen) for name, one in found] == [("b", 2), ("a", 1), ("b", 1)]
    assert torch.equal(found[0][1].mask, mask) and torch.equal(found[0][1].weights, weights)
    assert found[1][1].mask is None and found[1][1].weights is None
    assert torch.equal(found[2][1].x, torch.full((1, 3), 7.0))


def test_rows_are_those_at_the_time_of_the_call() -> None:
    """What comes next in the model may work in place."""
    record, x = InputRecord(), torch.ones(2, 3)
    record.take("a", Rows(x, None, None, 2))
    x.zero_()
    ((_, rows),) = unpacked(record.packed([]), CPU)[0]
    assert torch.equal(rows.x, torch.ones(2, 3))


def test_what_was_packed_is_forgotten() -> None:
    record = InputRecord()
    record.take("a", Rows(torch.ones(1, 3), None, None, 1))
    record.packed([])
    rows, padded = unpacked(record.packed([]), CPU)
    assert (list(rows), padded) == ([], [])


def test_a_batch_takes_the_bytes_that_the_tables_of_docs_scale_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.delitem(sys.modules, "bench_scale", raising=False)
    import bench_scale

    model, record = (
        bench_scale.llama("small", 1, hidden=256, intermediate=688, heads=4, kv_heads=2, head=64),
        InputRecord(),
    )
    for place, (channels, copies, reached) in enumerate(model.inputs):
        assert copies == reached == 1
        record.take(f"layer {place}", Rows(torch.ones(1, 128, channels, dtype=torch.bfloat16), None, None, 128))
    assert record.packed([]).nbytes == pytest.approx(128 * model.input_bytes, rel=0.01)
