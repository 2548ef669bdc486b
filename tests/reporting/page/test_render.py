"""The HTML report: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import models
import pytest

import awq_ext
from awq_ext import AwqReport, BlockReport, LayerReport
from awq_ext.reporting.page import plots as figures
from awq_ext.reporting.page import render as page
from awq_ext.reporting.page.layer_kinds import KINDS
from awq_ext.reporting.report import TAIL_PLACES

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
    assert f"{report.bytes_before:,} → {report.bytes_after:,} bytes" in text
    for fact in (report.model, *report.command.split(), *report.versions.values(), report.date.partition("T")[0]):
        assert fact in text
    ratio = report["layers.0.up"].loss / report["layers.0.up"].loss_rtn
    assert f"{ratio:.3f}" in text


def test_nothing_is_loaded_from_anywhere(html: Path) -> None:
    text = html.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"'<) ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert "<img" not in text and "@import" not in text and "url(data" not in text and " onclick" not in text
    # the one script that may run is the one that is there
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    assert f'content="{policy}"' in text and text.count("<script") == 1
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) == {"data:,"}


# A function of the document: sort the layers by a click on a heading, and list the column after each of two clicks.
CLICKS = """(page) => {{
  const table = page.getElementById("layers");
  const column = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === "{title}");
  const head = table.tHead.rows[0].cells[column];
  return [1, 2].map(() => {{
    head.firstElementChild.click();
    return [head.getAttribute("aria-sort"), [...table.tBodies[0].rows].map((row) => row.cells[column].textContent)];
  }});
}}"""


@pytest.mark.exhaustive  # a browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(html: Path, width: int, dark: bool, tmp_path: Path) -> None:
    shown = browser.show(html, width, tmp_path, dark)
    assert shown.console == []
    assert shown.loaded == []
    assert shown.width <= width, "the page must not scroll sideways"
    assert shown.smallest >= 9, "text too small to read"
    assert len(shown.plots) == 6
    for plot_width, plot_height in shown.plots:
        assert plot_width >= 250 and plot_height >= 150
    assert_drawn(shown.screenshot, width, dark)


def assert_drawn(screenshot: Path, width: int, dark: bool) -> None:
    """The screenshot is as wide as asked, its ground is as light or dark, and its tables have the colours of the layers' kinds."""
    from matplotlib.image import imread

    pixels = imread(screenshot)
    assert pixels.shape[1] == width
    seen = {tuple(pixel) for pixel in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    wanted = [KINDS[kind].dark if dark else KINDS[kind].light for kind in ("up", "down")]
    assert {tuple(bytes.fromhex(colour[1:])) for colour in wanted} <= seen
    assert (pixels[5, 5, :3].max() < 0.2) if dark else (pixels[5, 5, :3].min() > 0.9)


@pytest.mark.exhaustive  # a browser
@pytest.mark.parametrize("title", ["loss", "layer"])
def test_a_click_on_a_heading_sorts(title: str, tmp_path: Path) -> None:
    values = [0.5, 1e-9, None, 20.0, 3.0]
    rows = [
        LayerReport(f"h.{i}.q", 8, 8, "int4", loss=value, bits=4)
        for i, value in zip((10, 9, 1, 2, 0), values, strict=True)
    ]
    path = AwqReport(layers=rows).to_html(tmp_path / "r.html")
    first, second = browser.show(path, 800, tmp_path, script=CLICKS.format(title=title)).given
    numbers = [["20", "3", "0.5", "1e-09", ""], ["1e-09", "0.5", "3", "20", ""]]
    names = [f"h.{i}.q" for i in (0, 1, 2, 9, 10)]
    wanted = {"loss": numbers, "layer": [names, names[::-1]]}[title]
    order = ["ascending", "descending"] if title == "layer" else ["descending", "ascending"]
    assert [first, second] == [list(pair) for pair in zip(order, wanted, strict=True)]


@pytest.fixture(scope="module")
def large() -> AwqReport:
    """A report of 30 blocks as a language model of a hundred million weights has them."""
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    rows = []
    for block, name in itertools.product(range(30), names):
        group = "" if name in ("self_attn.o_proj", "mlp.down_proj") else f"model.layers.{block}.{name}"
        values = {
            "loss": 0.1 + block,
            "loss_rtn": 1.0 + 2 * block,
            "alpha": block / 30,
            "tokens": 4096,
            "top_share": 0.01 + block / 100,
        }
        values |= {"tail": [10 + block, *[1.0] * (len(TAIL_PLACES) - 1)], "scale": "duo", "applied": "norm"}
        rows.append(LayerReport(f"model.layers.{block}.{name}", 576, 576, "int4", "awq", 4, 64, group, **values))
    return AwqReport(layers=rows, blocks=[BlockReport(f"model.layers.{i}", 1e-6, 0.01 * i) for i in range(30)])


@pytest.fixture(scope="module")
def large_page(large: AwqReport) -> str:
    return page.render(large)


def drawn(text: str) -> dict[str, str]:
    """The plots of a page, by title."""
    return dict(re.findall(r"<figure><h2>(.*?)</h2>.*?(<svg.*?</svg>)", text, re.DOTALL))


def test_a_kind_has_one_colour_and_one_marker_in_all_plots(large_page: str) -> None:
    seen: dict[str, set[tuple[str, str]]] = {}
    plots = drawn(large_page)
    for name in ("Losses beside plain rounding", "Losses", "Alpha", "What one channel in a hundred holds"):
        markers = dict(re.findall(r'<path id="[^"]*-(m\w+)" d="([^"]*)"', plots[name]))
        for marker, style, title in re.findall(
            r'<use xlink:href="#[^"]*-(m\w+)"[^>]*style="([^"]*)"><title>([^<]*)', plots[name]
        ):
            (color,) = set(re.findall(r"var\(--([\w-]+)\)", style))
            seen.setdefault(title.split(": ")[0].split(".")[-1], set()).add((color, markers[marker]))
    assert {name: {color for color, _ in looks} for name, looks in seen.items()} == {
        f"{kind}_proj": {f"kind-{kind}"} for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert all(len(looks) == 1 for looks in seen.values())
    assert len({marker for looks in seen.values() for _, marker in looks}) == 7


def test_plots_have_no_colours_of_their_own(large_page: str) -> None:
    for name, svg in drawn(large_page).items():
        assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == [], name
        variables = set(re.findall(r"var\(--([\w-]+)\)", svg))
        known = set(re.findall(r"--([\w-]+):", large_page))
        assert variables and variables <= known


def test_only_a_few_of_many_lines_are_bold_and_named(large_page: str) -> None:
    svg = drawn(large_page)["Heavy tails"]
    widths = re.findall(r"stroke-width: ([\d.]+)", svg)
    assert widths.count("0.7") == 30 * 7 - 3 + 7 and widths.count("1.8") == 3  # and those of the legend
    named = re.findall(r'id="tails-label\d+".*?>([^<]+)</text>', svg, re.DOTALL)
    assert sorted(named) == ["29 k", "29 q", "29 v"]


def test_the_page_of_a_model_of_30_blocks_is_small(large_page: str) -> None:
    assert len(large_page.encode()) < 1_000_000


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"packed": False, "bits": 3}, {"fold": "never"}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "llama", "shared_block"])
def test_any_report_can_be_shown(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    case = models.make(name)
    found = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=3, progress=False, **settings).awq_report
    loaded = AwqReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert Parsed(loaded.to_html(tmp_path / "r.html").read_text(encoding="utf-8")).open == []


def test_reports_with_next_to_nothing(tmp_path: Path) -> None:
    rows = [LayerReport("a<b>", 4, 4, "float", note="skipped & gone"), LayerReport("c", 4, 4, "int4", note="NaN")]
    rows += [
        LayerReport(f"<i>.{i}.q", 4, 4, "int4", loss=1.0, loss_rtn=2.0) for i in range(2)
    ]  # in a point's title, too
    rows += [
        LayerReport(f"h.{i}.k", 4, 4, "int4", loss=v, loss_rtn=1.0, tail=[0.0] * 14, top_share=v)
        for i, v in enumerate((math.nan, math.inf))
    ]
    found = AwqReport(layers=rows, blocks=[BlockReport("")], warnings=["<script>alert(1)</script>"])
    text = found.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert (
        "a&lt;b&gt;" in text
        and "skipped &amp; gone" in text
        and "&lt;i&gt;.0.q: 0.5" in text
        and "<i>." not in text
        and "<script>alert" not in text
    )
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


def test_times_add_up_to_the_whole() -> None:
    """Tuning has a line of its own where there was any."""
    report = AwqReport(config={}, seconds=10.0, calibration_seconds=2.0, search_seconds=3.0, tuning_seconds=4.0)
    assert page._times(report) == [
        ("calibration", 2.0, 0.2),
        ("search and rounding", 3.0, 0.3),
        ("tuning of scales", 4.0, 0.4),
        ("rest", 1.0, 0.1),
    ]
    report.tuning_seconds = 0.0
    assert [what for what, *_ in page._times(report)] == ["calibration", "search and rounding", "rest"]
