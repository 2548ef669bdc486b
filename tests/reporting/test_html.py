"""The HTML report: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import models
import pytest

import awq_ext
from awq_ext import AwqReport, BlockReport, LayerReport
from awq_ext.reporting import html as page
from awq_ext.reporting import plots as figures

pytest.importorskip("jinja2", reason="the report was NOT tested: pip install 'awq-ext[report]'")
pytest.importorskip("matplotlib", reason="the report was NOT tested: pip install 'awq-ext[report]'")


@pytest.fixture(scope="module")
def report() -> AwqReport:
    case = models.make("uncalled")
    return awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=4, progress=False).awq_report


@pytest.fixture(scope="module")
def html(report: AwqReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.to_html(tmp_path_factory.mktemp("page") / "report.html")


class Parsed(HTMLParser):
    """Text, and whether every element is closed."""

    VOID = frozenset(["meta", "link", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_tells_everything(report: AwqReport, html: Path) -> None:
    parsed = Parsed(html.read_text(encoding="utf-8"))
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids)), "ids of several plots clash"
    text = " ".join(parsed.text)
    for row in report.layers:
        assert row.name in text
    for words in (
        "the output layer, by its name",
        "Losses beside plain rounding",
        "Alpha",
        "Heavy tails",
        "6 of 10",
        report.summary(),
    ):
        assert words in text
    ratio = report["layers.0.up"].loss / report["layers.0.up"].loss_rtn
    assert f"{ratio:.3f}" in text


def test_nothing_is_loaded_from_anywhere(html: Path) -> None:
    text = html.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"'<) ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert "<script" not in text and "<img" not in text and "@import" not in text
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) == {"data:,"}


@pytest.mark.exhaustive  # a browser
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(html: Path, width: int, tmp_path: Path) -> None:
    shown = browser.show(html, width, tmp_path)
    assert shown.console == []
    assert shown.loaded == []
    assert shown.width <= width, "the page must not scroll sideways"
    assert shown.smallest >= 9, "text too small to read"
    assert len(shown.plots) == 8
    for plot_width, plot_height in shown.plots:
        assert plot_width >= 250 and plot_height >= 80
    assert_drawn(shown.screenshot, width)


def assert_drawn(screenshot: Path, width: int) -> None:
    """The screenshot is as wide as asked, and its plots have the colours of the layers."""
    from matplotlib.image import imread

    pixels = imread(screenshot)
    assert pixels.shape[1] == width
    seen = {tuple(pixel) for pixel in (pixels[::2, ::2, :3] * 255).round().astype(int).reshape(-1, 3)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in figures.COLOURS[:2]} <= seen


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"packed": False, "bits": 3}, {"fold": "never"}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "llama", "shared_block"])
def test_any_report_can_be_shown(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    case = models.make(name)
    found = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=3, progress=False, **settings).awq_report
    loaded = AwqReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert Parsed(loaded.to_html(tmp_path / "r.html").read_text(encoding="utf-8")).open == []


def test_reports_with_next_to_nothing(tmp_path: Path) -> None:
    rows = [LayerReport("a<b>", 4, 4, "float", note="skipped & gone"), LayerReport("c", 4, 4, "int4", note="NaN")]
    found = AwqReport(layers=rows, blocks=[BlockReport("")], warnings=["<script>alert(1)</script>"])
    text = found.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;" in text and "skipped &amp; gone" in text and "<script>" not in text
    assert Parsed(AwqReport().to_html(tmp_path / "s.html").read_text(encoding="utf-8")).open == []


def test_experts_that_saw_few_tokens_are_drawn() -> None:
    rows = [
        LayerReport(f"layers.{i}.experts.{e}.up", 8, 8, "int4", tokens=e, bits=4) for i in range(2) for e in range(3)
    ]
    assert "tokens seen" in figures.tokens(AwqReport(layers=rows))
    assert figures.tokens(AwqReport(layers=rows[:1])) is None


def test_the_same_report_gives_the_same_page(report: AwqReport) -> None:
    assert page.render(report) == page.render(report)


NAMES = [f"model.layers.0.mlp.experts.gate_up_proj.{e} ({e})" for e in range(64)]


def many_names() -> AwqReport:
    return AwqReport(warnings=[f"{', '.join(NAMES)}: too few rows; rounded to nearest instead", "short: one"])


def test_a_warning_with_many_names_is_folded(tmp_path: Path) -> None:
    text = many_names().to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<summary>64 layers: too few rows; rounded to nearest instead</summary>" in text
    assert all(name in text for name in NAMES) and "<li>short: one</li>" in text


@pytest.mark.exhaustive  # a browser
def test_a_warning_with_many_names_does_not_widen_the_page(tmp_path: Path) -> None:
    many_names().to_html(tmp_path / "r.html")
    assert browser.show(tmp_path / "r.html", 400, tmp_path).width <= 400


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(
    report: AwqReport, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"awq-ext\[report\]"):
        report.to_html(tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
