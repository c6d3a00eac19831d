# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a comparison: read as HTML, and opened in a browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.cli import main
from matplotlib.image import imread
from test_fields import FLUX, X, Y, write_field

EVIL = """<i hidden>"'&$_{"""
"""A name that is markup and unfinished mathematics."""


class Page(HTMLParser):
    """What a report holds: its pictures, tables, links, anchors and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.policy = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")], f"{tag} has a handler: {values}"
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag == "img":
            self.images.append(values)
        elif tag == "a":
            self.links.append(values["href"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            assert "src" not in values
            self.scripts.append("")
        elif tag == "meta" and values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag not in ("img", "meta", "link", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on sixteen objects, three deblenders, one of them with a name that is an attack."""
    path = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(6)
    x, y = [*X, *rng.uniform(15, 105, 12)], [*Y, *rng.uniform(15, 105, 12)]
    arrays = write_field(path / "field_00.npz", x, y, [*FLUX, *rng.uniform(200, 900, (12, 3))])
    for name, width in (("good", 0.02), ("bad", 0.4)):
        (path / name).mkdir()
        factor = 1 + rng.normal(0, width, (16, 3, 1, 1))
        model = (arrays["stamp"] * factor).astype(np.float32)
        model[5] = np.nan if name == "bad" else model[5]
        np.savez(path / name / "field_00.npz", model=model, seconds=1.0)
    spec = [f"{EVIL}={path / 'good'}", f"bad={path / 'bad'}", "sep"]
    result = CliRunner().invoke(main, ["compare", *spec, "--truth", str(path), str(path / "out")])
    assert result.exit_code == 0, result.output
    assert "flux_nmad" in result.output and result.output.endswith("compare.html\n")
    return path / "out" / "compare.html"


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text())


def test_nothing_of_the_input_is_markup(report, page):
    assert page.open == []
    text = report.read_text()
    assert EVIL not in text and html.escape(EVIL) in text
    # Only the report's own script may run, and nothing may be loaded.
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and "default-src 'none'" in page.policy
    assert "http://" not in text and "https://" not in text and EVIL not in page.scripts[0]


def test_pictures_are_in_the_file_and_show_something(page):
    assert len(page.images) > 12 + 20
    for image in page.images:
        assert image["alt"] and image["src"].startswith("data:image/png;base64,")
        pixels = imread(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert pixels.shape[0] >= 65 and (np.ptp(pixels[..., :3]) > 0 or image["alt"].endswith(": none"))


def test_tables_are_filled_and_their_rows_lead_to_pictures(page):
    assert len(page.tables) > 5
    for rows in page.tables:
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1
    objects = page.tables[-1]
    # All that two list are there; what nobody but sep added is not theirs.
    assert len(objects) == 1 + 16 and objects[0][0] == "object"
    assert page.links and all(link[1:] in page.anchors for link in page.links)
    pictures = [link for link in page.links if link.startswith("#object-")]
    assert len(pictures) == len([a for a in page.anchors if a.startswith("object-")]) >= 10


def test_the_verdict_comes_first_and_is_right(page):
    words = " ".join(page.words)
    assert words.index("Verdict") < words.index("Plots") < words.index("Worst disagreements")
    verdict = {row[0]: row for row in page.tables[0]}
    row = verdict["flux error, NMAD"]
    assert EVIL in row[4] and " by " in row[4]
    assert re.match(r"0\.0\d+ ± 0\.\d+$", row[1])
    assert "no difference" in verdict["aperture flux, redistributed, median"][4]


_PROBE = """
window.failed = [];
window.addEventListener('error', function (e) { window.failed.push(String(e.message)); });
window.addEventListener('load', function () {
  var images = Array.from(document.images);
  var table = document.querySelector('#objects ~ div table'), out = [];
  table.tHead.rows[0].cells[2].querySelector('button').click();
  Array.from(table.tBodies[0].rows).forEach(function (row) { out.push(row.cells[2].dataset.v); });
  document.title = JSON.stringify({
    broken: images.filter(function (i) { return !i.complete || i.naturalWidth === 0; }).length,
    images: images.length, sorted: out, failed: window.failed,
    empty: Array.from(document.querySelectorAll('table')).filter(
      function (t) { return t.tBodies[0].rows.length === 0; }).length,
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
});
"""


def _browser(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    return subprocess.run(
        [*command, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )


def test_a_browser_has_nothing_to_complain_about(report):
    done = _browser(report.as_uri())
    assert "<h1>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


@pytest.mark.parametrize("width", [1400, 600])
def test_a_browser_shows_all_of_it(report, page, tmp_path, width):
    text = report.read_text()
    # A copy that lets the test's own script in.
    text = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", text)
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</head>", f"<script>{_PROBE}</script></head>"))
    done = _browser(copy.as_uri(), f"--window-size={width},1000")
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))
    assert found["failed"] == [] and found["broken"] == 0 and found["empty"] == 0
    assert found["images"] == len(page.images)
    values = [float(v) for v in found["sorted"]]
    assert len(values) == 16 and values == sorted(values)
    # Wide tables scroll by themselves, the page does not.
    assert found["wider"] == 0
