"""Tables of the page: what is shown, what it is sorted by, and how warm it is."""

from __future__ import annotations

import math

from awq_ext import AwqReport, BlockReport, LayerReport
from awq_ext.reporting.page import columns
from awq_ext.reporting.page.columns import Sheet


def column(sheet: Sheet, title: str) -> list[columns.Cell]:
    place = [one.title for one in sheet.columns].index(title)
    return [row[place] for row in sheet.rows]


ROWS = [
    LayerReport("h.0.q", 100, 50, "int4", bits=4, group_size=-1, alpha=0.5, loss=0.01, loss_rtn=0.02, tokens=12345, applied="norm"),
    LayerReport("h.0.mlp.down_proj", 1000, 5, "int8", bits=8, group_size=128, loss=1.0, loss_rtn=1.0, applied="run time"),
    LayerReport("h.1.q", 100, 50, "int4", bits=4, group_size=32, loss=0.1, applied="norm"),
    LayerReport("h.1.bad", 100, 50, "int4", bits=4, group_size=32, loss=math.inf),
    LayerReport("lm_head", 0, 0, "float", note="the output layer"),
]  # fmt: skip


def test_layers() -> None:
    sheet = columns.layers(AwqReport(layers=ROWS))
    assert [cell.text for cell in column(sheet, "layer")] == ["h.0.q", "h.0.mlp.down_proj", "h.1.q", "h.1.bad"]
    assert [cell.kind for cell in column(sheet, "kind")] == ["q", "down", "q", "other"]
    assert [cell.text for cell in column(sheet, "bits a weight")][:3] == ["4.20", "8.19", "4.80"]  # 4 + 20 / 100 ...
    assert [cell.heat for cell in column(sheet, "loss")] == [0, 1, 0.5, None]
    assert [(c.text, c.number, c.heat) for c in column(sheet, "loss / RTN's")][:3] == [
        ("0.500", 0.5, 0.5),
        ("1.000", 1, 1),
        ("", None, None),
    ]
    assert column(sheet, "loss")[3].text == "not finite"
    assert [(c.text, c.number) for c in column(sheet, "group")][:2] == [("row", math.inf), ("128", 128)]
    assert column(sheet, "tokens")[0] == columns.Cell("12,345", 12345)
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_where_scales_went_is_counted_by_kind() -> None:
    sheet = columns.folds(AwqReport(layers=ROWS))
    assert [one.title for one in sheet.columns] == ["kind", "a norm", "run time", "no scale"]
    assert {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows} == {
        "q": ["2", "", ""],
        "down": ["", "1", ""],
        "other": ["", "", "1"],
    }
    assert columns.folds(AwqReport(layers=ROWS[-1:])) is None


def test_evaluations_have_a_column_for_each_measure() -> None:
    kl = {"value": 0.25, "low": 0.2, "high": 0.3}
    found = {
        "code": {"perplexity": {"value": 8.0, "low": None, "high": None}, "kl": kl, "tokens": 4096},
        "images": {"accuracy": {"value": None, "low": None, "high": None}},
    }
    sheet = columns.evaluations(AwqReport(evaluations=found))
    titles = [one.title for one in sheet.columns]
    assert titles[0] == "evaluation text" and titles[1::2] == [
        "KL, nats a token",
        "perplexity",
        "accuracy",
        "tokens scored",
    ]
    assert [cell.text for cell in sheet.rows[0]] == ["code", "0.25", "0.2 to 0.3", "8", "", "", "", "4,096"]
    assert [cell.text for cell in sheet.rows[1]] == ["images", "", "", "", "", "not finite", "", ""]
    assert sheet.rows[0][1].heat == 0.5  # of what is large
    assert columns.evaluations(AwqReport()) is None


def test_blocks() -> None:
    sheet = columns.blocks(AwqReport(blocks=[BlockReport("", output_error=0.5), BlockReport("b", 0.1, 0.25, "why")]))
    assert [[cell.text for cell in row] for row in sheet.rows] == [
        ["(whole model)", "5.00e-01", "", ""],
        ["b", "2.50e-01", "1.0e-01", "why"],
    ]
    assert [row[1].heat for row in sheet.rows] == [1, 0.5]
    assert columns.blocks(AwqReport()) is None
