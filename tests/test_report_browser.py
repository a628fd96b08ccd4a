"""The report in a real browser: every chart drawn, no console message, light and dark. Needs an installed Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from report_rows import made_up

from attention_zoo.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def opened(page, profile, *more: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what was said on the console."""
    assert CHROMIUM
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=20000",
         "--window-size=1280,900",         *more, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_every_chart_is_drawn_and_the_console_is_silent(tmp_path):
    page = build_report(made_up(), tmp_path / "report.html")
    document, console = opened(page, tmp_path / "profile")
    assert console == []
    plots = re.findall(r'<div class="plot[^"]*" data-figure="([^"]+)"[^>]*data-drawn="yes"', document)
    assert len(plots) == document.count('role="img"') == 14
    assert '<body data-drawn="14">' in document
    assert document.count('class="main-svg"') >= 14
    assert document.count('class="trace scatter') > 40
    assert document.count('class="hm"') == 5, "one picture a backend"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext is installed")
def test_on_paper_nothing_is_cut_off(tmp_path):
    rows = [*made_up(3), *(row | {"from": "elsewhere", "id": f"{row['id']}-2"} for row in made_up(2))]
    page = build_report(rows, tmp_path / "report.html")
    paper = tmp_path / "report.pdf"
    opened(page, tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    said = subprocess.run(["pdftotext", paper, "-"], capture_output=True, text=True, timeout=60, check=True).stdout
    # what lies beyond the edge of the paper is not in the file; this is the heading of the last columns of the summary
    assert "Model" in said.split()
    assert said.count("full (materialised; elsewhere)") >= 1


@pytest.mark.slow
def test_a_broken_script_would_be_noticed(tmp_path):
    page = build_report(made_up(), tmp_path / "report.html")
    page.write_text(page.read_text().replace("Plotly.react", "Plotly.reackt"))
    _, console = opened(page, tmp_path / "profile")
    assert any("reackt" in line for line in console)


@pytest.mark.slow
def test_dark_is_drawn_in_dark_colours(tmp_path):
    page = build_report(made_up(), tmp_path / "report.html")
    document, console = opened(page, tmp_path / "profile", "--blink-settings=preferredColorScheme=0")
    assert console == []
    svgs = "".join(re.findall(r'<svg class="main-svg".*?</svg>', document, re.S))
    assert "rgb(91, 151, 242)" in svgs, "the dark partner of blue"
    assert "rgb(43, 111, 214)" not in svgs
