"""The report as HTML, Markdown and JSON: whole, escaped, and drawn by a real browser without a complaint."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlmops.profiling import report
from vlmops.profiling.report import plots
from vlmops.profiling.report.data import Dot, Memory, Peaks, Piece, Profile, Row, Run

NASTY = "</script><script>console.error('ran')</script><b>&|*_`$x$"
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def run(name: str, scale: float) -> Run:
    op = "op" if name == "patched" else "stock"
    label = "mlp cpu" if name == "patched" else "aten::addmm"
    return Run(
        name, 2, 0.1 * scale, 0.1 * scale, (0.09 * scale, 0.08 * scale, 0.1 * scale),
        [Row("stage", "vision", "", 1, 0.1 * scale, 0.09 * scale), Row("stage", NASTY, "", 1, 0.01 * scale, 0.01 * scale)],
        [Row("module", f"blocks.{i}", "Block", 1, 0.04 * scale, 0.01) for i in range(2)]
        + [Row("module", NASTY, NASTY, 1, 0.01, 0.01)],
        [Row(op, label, "4x3 fp32", 2, 0.08 * scale, 0.01), Row("stock", NASTY, NASTY, 1, 0.01, 0.01)],
        [Row("stock", "aten::copy_", NASTY, 4, 0.01, 0.01)],
        [Piece("vision", "blocks.0", op, label, 0.08 * scale), Piece("vision", "", "unnamed", "vision", 0.01 * scale),
         Piece(NASTY, NASTY, "python", NASTY, 0.01 * scale)],
        [Dot(label, NASTY, op, 2, 0.04 * scale, 1e9, 1e7), Dot("norms cpu", "4 fp32", op, 1, 0.001, 0, 1e6)],
        Memory([(0.0, 0), (0.01, 1 << 20), (0.05, 0)], 1 << 20, NASTY), trace=gzip.compress(b'{"traceEvents": []}'),
    )  # fmt: skip


@pytest.fixture
def profile() -> Profile:
    patch = [dict(module="a", cls=NASTY, operation="linear", backend="auto", status="skipped", why=NASTY, error=None)]
    return Profile(
        f"Model{NASTY}", {"pixel_values": NASTY}, "fp32", "cpu", 0, {"stock": run("stock", 1.5), "patched": run("patched", 1.0)},
        Peaks(1e10, 1e11, "fp32", 1 << 20), patch, [], "equal", {"date": "today", "command": f"vlmops profile {NASTY}"},
    )  # fmt: skip


class Page(HTMLParser):
    """Counts tags and gathers text and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.text: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_escaped(profile: Profile) -> None:
    pytest.importorskip("plotly", reason="the HTML report draws with plotly")
    html = report.as_html(profile, ["trace-stock.json.gz"])
    page = Page()
    page.feed(html)
    assert page.outside == []
    assert NASTY not in html
    assert html.count("</script>") == page.tags["script"] and "b" not in page.tags
    text = "".join(page.text)
    for wanted in (
        f"Profile of Model{NASTY}",
        "Opportunities",
        "Accounting",
        "Roofline",
        "trace-stock.json.gz",
        "date: today",
    ):
        assert wanted in text
    for name in ("stages", "modules", "ops", "roofline", "memory"):
        assert f'id="plot-{name}"' in html


def test_figures_hold_the_profile(profile: Profile) -> None:
    pytest.importorskip("plotly", reason="the HTML report draws with plotly")
    made = {name: figure for name, (_, figure) in plots.figures(profile).items()}
    stages = {bar.name: list(bar.x) for bar in made["stages"].data}
    assert stages["vlmops ops"] == pytest.approx([0, 80, 0, 0]) and stages["PyTorch ops"] == pytest.approx(
        [120, 0, 0, 0]
    )
    assert sum(map(sum, stages.values())) == pytest.approx(250)
    stock, patched = made["modules"].data
    assert stock.y[0] == "blocks.*" and stock.x[0] == pytest.approx(120) and patched.x[0] == pytest.approx(80)
    assert (made["ops"].data[0].y[0], made["ops"].data[0].x[0]) == ("aten::addmm", pytest.approx(120))
    nasty = [
        y for bar in (*made["stages"].data, *made["modules"].data, *made["ops"].data) for y in bar.y if "script" in y
    ]
    assert nasty and all("&lt;b&gt;&amp;" in y and "<" not in y for y in nasty)  # plotly would read <b> as bold
    roof, *dots = made["roofline"].data
    assert roof.x[1] == pytest.approx(10) and roof.y[1] == roof.y[2]
    assert max(roof.y) == pytest.approx(100) and roof.y[0] / roof.x[0] == pytest.approx(10)
    assert [len(d.x) for d in dots] == [1, 1, 1, 1]
    assert dots[0].x[0] == pytest.approx(100) and dots[0].y[0] == pytest.approx(1e9 / 0.06 / 1e9)
    assert dots[1].y[0] == pytest.approx(1.0)  # norms: 1 MB in 1 ms
    assert [list(line.y) for line in made["memory"].data] == [[0, 1, 0], [0, 1, 0]]


def test_markdown_tables_keep_their_columns(profile: Profile) -> None:
    text = report.as_markdown(profile)
    assert "<" not in text and "\\|" in text
    width = None
    for line in text.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (None, cells)
            width = cells
        else:
            width = None
    for title in ("Opportunities", "Stages", "Accounting", "Modules", "Ops", "Roofline", "Patching", "Memory"):
        assert f"## {title}\n" in text
    assert "| vision | 150.000 | 135.000 | 100.0% | 100.000 | 90.000 | 100.0% |" in text


def test_json_is_plain_and_complete(profile: Profile) -> None:
    data = json.loads(report.as_json(profile))
    assert data["schema"] == 1 and data["model"] == f"Model{NASTY}"
    patched = data["runs"]["patched"]
    assert "trace" not in patched
    assert patched["accounting"]["shares"] == pytest.approx({"op": 0.8, "stock": 0, "python": 0.1, "unnamed": 0.1})
    assert patched["accounting"]["stages"]["vision"]["difference"] == pytest.approx(0)
    assert patched["dots"][0]["share"] == pytest.approx(0.25) and patched["dots"][0]["intensity"] == pytest.approx(100)
    assert data["opportunities"] and set(data["opportunities"][0]) == {"kind", "what", "todo", "seconds"}


def test_files(profile: Profile, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the HTML report draws with plotly")
    written = report.write(profile, tmp_path / "a" / "b")
    assert {name: path.name for name, path in written.items()} == {
        "trace-stock": "trace-stock.json.gz", "trace-patched": "trace-patched.json.gz", "json": "report.json",
        "markdown": "report.md", "html": "report.html",
    }  # fmt: skip
    assert json.loads(gzip.decompress(written["trace-stock"].read_bytes())) == {"traceEvents": []}


def test_without_plotly_nothing_is_written_and_the_way_is_said(
    profile: Profile, tmp_path: Path, monkeypatch: Any
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(plots.importlib, "import_module", missing)
    with pytest.raises(report.PlotlyMissingError, match=re.escape('pip install "vlmops[profile]"')):
        report.write(profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(report.write(profile, tmp_path / "out", html=False)) == {
        "trace-stock",
        "trace-patched",
        "json",
        "markdown",
    }


# -- in a browser ------------------------------------------------------------------------------------------------------


def opened(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what they said on the console."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no headless Chromium here: apt-get install chromium-headless-shell")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}",
        "--virtual-time-budget=20000", "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
def test_a_browser_draws_every_plot_without_an_error(profile: Profile, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the HTML report draws with plotly")
    page = report.write(profile, tmp_path)["html"]
    dom, console = opened(page, tmp_path / "browser")
    assert console == []
    body = dom[dom.rindex("<body>") :]
    for name in ("stages", "modules", "ops", "roofline", "memory"):
        begin = body.index(f'id="plot-{name}"')
        drawn = body[begin : body.find('id="plot-', begin + 10)]
        assert "main-svg" in drawn, name
        marks = 'class="js-line"' if name == "memory" else 'class="point"'
        assert marks in drawn, name
    assert "&lt;b&gt;" in body and "<b>" not in body


@pytest.mark.browser
def test_a_page_that_fails_is_noticed(tmp_path: Path) -> None:
    """What the test above relies on: errors, even late ones, reach the console's lines."""
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><script>setTimeout(() => { throw new Error("late") }, 500); nothere()</script>')
    _, console = opened(page, tmp_path / "browser")
    assert len(console) == 2 and "nothere is not defined" in console[0] and "late" in console[1]
