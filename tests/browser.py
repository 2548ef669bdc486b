"""A page in a headless Chromium: what it looks like and what it complains of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# The page is shown in a frame of the wanted width: a window cannot be as narrow as a phone. What it measures it writes into itself.
WRAPPER = """<body style="margin:0"><iframe id="page" src="{url}" width="{width}" height="{height}" style="border:0"></iframe>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument;
  const all = [...page.querySelectorAll("svg text, td, p, figcaption, dd, dt, h1, h2, li")];
  const texts = all.filter((e) => e.getClientRects().length);
  const zoom = (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const scale = (e) => (e.ownerSVGElement ? zoom(e.ownerSVGElement) : 1);
  const given = {script};
  const found = {{
    given: given(page),
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    smallest: Math.min(...texts.map((e) => parseFloat(page.defaultView.getComputedStyle(e).fontSize) * scale(e))),
    plots: [...page.querySelectorAll("svg")].map((e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]),
    loaded: page.defaultView.performance.getEntriesByType("resource").map((e) => e.name),
  }};
  const note = document.createElement("pre");
  note.id = "found";
  note.textContent = JSON.stringify(found);
  document.body.append(note);
}};
</script></body>"""


@dataclass(frozen=True)
class Shown:
    """What the browser found. given: by the caller's script; width, height: of the page; smallest: text, in pixels.

    plots: [width, height] of each; loaded: files.
    """

    given: Any
    width: int
    height: int
    smallest: float
    plots: list[list[float]]
    loaded: list[str]
    console: list[str]
    screenshot: Path


def show(page: Path, width: int, folder: Path, dark: bool = False, script: str = "() => null") -> Shown:
    """Open ``page`` at ``width`` pixels; the screenshot goes to ``folder``. Skips the test where there is no Chromium.

    dark: what the reader's system prefers. script: a JavaScript function of the page's document; what it returns is JSON.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"NO BROWSER TESTED: none of {', '.join(PROGRAMS)} is installed (apt-get install chromium)")
    wrapper, screenshot = folder / f"wrapper-{width}.html", folder / f"page-{width}.png"
    wrapper.write_text(WRAPPER.format(url=page.as_uri(), width=width, height=6000, script=script))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    options += ["--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={width},6000", "--virtual-time-budget=3000"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *options, *more, wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )

    dumped = run("--dump-dom")
    run(f"--screenshot={screenshot}")
    noted = re.search(r'<pre id="found">(.*?)</pre>', dumped.stdout, re.DOTALL)
    assert noted, f"the page did not load:\n{dumped.stdout[-2000:]}\n{dumped.stderr[-2000:]}"
    console = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
    return Shown(**json.loads(unescape(noted.group(1))), console=console, screenshot=screenshot)
