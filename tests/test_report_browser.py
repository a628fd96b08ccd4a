"""The dashboard in a real browser: filter, sort, link, compare, download, share, print; light, dark, wide and narrow.

Needs an installed Chromium. One browser serves all tests of the file.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Browser, browser
from report_rows import LENGTHS, made_up, portrait, quality, speed, unfinished

from attention_zoo.report import build_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"
ALL = ["memory", "time", "quality", "pareto-memory", "pareto-time", "learning", "position", "distance", "lengths"]
SHOWN = "[...document.querySelectorAll('.card:not([hidden])')].map(card => card.dataset.chart)"
KEYS = "[...document.querySelectorAll('.runs tr[data-key]')].map(line => line.dataset.key)"


def rows() -> list[dict[str, Any]]:
    """A comparison over three seeds with what charts of distance and spans need, and one hostile run."""
    found = made_up(3)
    for row in found:
        if row["kind"] == "quality" and row["task"] == "mqar":
            row["by_group"] = {"distance": [[1, 1.0, 0.1, 50], [8, row["metrics"]["accuracy"], 1.0, 50]]}
    lost = quality("bigbird", "text", 7, config={"attention": {"name": "bigbird"}, "note": HOSTILE})
    return [*found, unfinished({**lost, "id": "hostile"}, "failed", HOSTILE)]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(rows(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(tab: Browser, page: Path) -> Iterator[Browser]:
    """The page as it opens; nothing may be said on the console until the test is through."""
    tab.said.clear()
    tab.open(page.as_uri())
    yield tab
    assert tab.said == []


def seen(tab: Browser, chart: str) -> None:
    """Scroll to a chart and wait until it is drawn."""
    tab.settle()
    tab.place(f'.plot[data-figure="{chart}"]')
    tab.until(f"document.querySelector('.plot[data-figure=\"{chart}\"] .main-svg') !== null")
    tab.settle()


def test_every_chart_is_drawn_with_its_axes_and_its_numbers(opened: Browser) -> None:
    assert opened.run(SHOWN) == ALL
    for chart in ALL:
        seen(opened, chart)
        card = f'.card[data-chart="{chart}"]'
        assert opened.run(f"document.querySelectorAll('{card} .xtick').length") >= 2
        assert opened.run(f"document.querySelectorAll('{card} .trace, {card} .hm').length") >= 1
        assert opened.run(f"document.querySelector('{card} .xtitle, {card} .ytitle') !== null")
        opened.run(f"document.querySelector('{card} details').open = true")
        opened.settle()
        assert opened.run(f"document.querySelectorAll('{card} tbody tr').length") >= 2, chart
    assert opened.run("document.querySelectorAll('.picture canvas').length") == 5
    marks = opened.run("zoo.charts.charts.find(each => each.key === 'time').spec.series.filter(each => each.lost)")
    assert [(mark["group"], mark["x"]) for mark in marks] == [("full (materialised)", [16384])]
    assert not {"quiet", "NaN"} & set(opened.run("document.body.innerText").split())


def test_a_filter_acts_on_table_charts_and_address_and_is_shared_by_it(opened: Browser, page: Path) -> None:
    every = len(rows())
    assert opened.run("zoo.by('count').textContent") == f"{every} of {every} runs"
    opened.click('.facet[data-field="mechanism"] summary')
    opened.click('.facet[data-field="mechanism"] input[data-value="bigbird"]')
    opened.click('.facet[data-field="mechanism"] input[data-value="full"]')
    mine = [row for row in rows() if row["backend"] in ("full", "bigbird")]
    assert opened.run("zoo.by('count').textContent") == f"{len(mine)} of {every} runs"
    seen(opened, "time")
    names = opened.run("zoo.charts.charts.find(each => each.key === 'time').spec.series.map(each => each.name)")
    assert set(names) == {"full (materialised)", "full (fused)", "bigbird"}
    assert "f.mechanism=bigbird" in opened.run("location.hash")
    opened.click("#search")
    opened.write("text seed")
    opened.run("zoo.state.change({q: 'text, 512'})")
    address = opened.run("location.href")
    shown = opened.run("zoo.select.shown().map(run => run.key)")
    assert shown == [row["id"] for row in mine if row.get("task") == "text"]
    opened.open(address)
    assert opened.run("zoo.select.shown().map(run => run.key)") == shown
    opened.run("zoo.state.change({q: 'mechanism=full'})")
    assert set(opened.run("zoo.select.shown().map(run => zoo.ask(run, 'mechanism'))")) == {"full"}
    opened.run("zoo.state.change({q: 'mechanism'})")
    assert opened.run("zoo.select.shown().length") == 0, "a name alone is what every run has"
    opened.click("#reset")
    assert opened.run("zoo.by('count').textContent") == f"{every} of {every} runs"


def test_any_field_of_a_config_filters_and_groups(opened: Browser) -> None:
    opened.run("""(() => {
        const more = zoo.by('more');
        more.value = 'options.window';
        more.dispatchEvent(new Event('change', {bubbles: true}));
        zoo.state.change({by: 'seed'});
    })()""")
    assert opened.run("document.querySelector('.facet[open]').dataset.field") == "options.window"
    assert opened.run("document.querySelector('.facet[data-field=\"options.window\"]') !== null")
    assert {"seed 0", "0"} & set(opened.run("zoo.select.groups().map(group => group.name)"))
    opened.run("zoo.state.change({by: 'label', where: {'options.window': ['8']}})")
    assert opened.run("zoo.select.shown().length") == 5


def test_words_of_a_list_are_looked_for_as_they_are(tab: Browser, tmp_path: Path) -> None:
    plain = quality("full", "text", config={"attention": {"name": "full"}, "note": ["plain", 1.0]})
    note = ["back\\slash", 'a "quoted" word', "é"]
    listed = quality("bigbird", "text", config={"attention": {"name": "bigbird"}, "note": note})
    tab.open(build_report([{**plain, "id": "plain"}, {**listed, "id": "listed"}], tmp_path / "report.html").as_uri())
    for said in ("back\\slash", "\\", '"quoted"', "é", '["back'):
        tab.run(f"zoo.state.change({{q: {json.dumps(said)}}})")
        assert tab.run("zoo.select.shown().map(run => run.key)") == ["listed"], said
    for said, keys in (('\\"', []), ("\\\\", []), ("\\u00e9", []), ('["plain",', ["plain"]), ("1.0]", ["plain"])):
        tab.run(f"zoo.state.change({{q: {json.dumps(said)}}})")
        assert tab.run("zoo.select.shown().map(run => run.key)") == keys, f"{said}: what is said, not its JSON"


def test_the_table_sorts_pins_and_shows_what_is_in_sight(opened: Browser) -> None:
    opened.run("zoo.state.change({where: {kind: ['training'], task: ['text, 512 tokens'], status: ['ok']}})")
    sort = '.runs th[data-column="score"] .sort'
    opened.click(sort)
    texts = [row for row in rows() if row["kind"] == "quality" and row["task"] == "text" and row["status"] == "ok"]
    best = sorted(texts, key=lambda row: row["metrics"]["bits_per_byte"])
    assert opened.run(KEYS)[:3] == [row["id"] for row in best[:3]]
    assert opened.run("document.querySelector('.runs th[data-column=score]').getAttribute('aria-sort')") == "ascending"
    opened.click(sort)
    assert opened.run(KEYS)[0] == best[-1]["id"]
    opened.click('.runs th[data-column="score"] .pin')
    places = opened.run("[...document.querySelectorAll('.runs thead th')].map(head => head.dataset.column)")
    assert places[:2] == ["label", "score"]
    left = "document.querySelector('.runs tbody td.pinned').getBoundingClientRect().left"
    before = opened.run(left)
    opened.run("zoo.by('table').scrollLeft = 200")
    assert opened.run(left) == before
    opened.run("zoo.state.change({rows: 'groups'})")
    assert "ø 2.526" in opened.run("document.querySelector('.runs tr.group').textContent")
    opened.run("zoo.state.change({where: {}})")
    groups = "[...document.querySelectorAll('.runs tr.group')].map(line => line.textContent)"
    assert not any("ø 2.526" in line for line in opened.run(groups)), "no mean over two tasks"


def test_what_is_pointed_at_and_chosen_shows_everywhere(opened: Browser) -> None:
    seen(opened, "memory")
    opened.point('.legend button[data-group="reformer"]')
    bright = (
        "[...document.querySelectorAll('.plot[data-figure=memory] .trace:not(.faint)')].map(node => node.classList[2])"
    )
    groups = opened.run("zoo.charts.charts.find(each => each.key === 'memory').spec.series.map(each => each.group)")
    assert opened.run(bright) == [f"tracememory-{groups.index('reformer')}"]
    assert opened.run("[...document.querySelectorAll('.picture.faint')].length") == 4
    opened.click('.legend button[data-group="reformer"]')
    for chart in ("memory", "time", "quality", "learning"):
        names = opened.run(
            f"zoo.charts.charts.find(each => each.key === '{chart}').spec.series.map(each => each.group)"
        )
        assert "reformer" not in names
        assert "bigbird" in names
    opened.click('.legend button[data-group="reformer"]')
    opened.point('.runs tr[data-key="reformer-auto-1024"]')
    assert opened.run("document.querySelector('.card[data-chart=memory]').dataset.linked") == "reformer"
    opened.run("zoo.link.point(null)")
    opened.run("zoo.link.choose('reformer-text-1')")
    opened.settle()
    assert opened.run("document.querySelector('.card[data-chart=memory]').dataset.linked") == "reformer"
    seen(opened, "learning")
    series = opened.run("zoo.charts.charts.find(each => each.key === 'learning').spec.series.map(each => each.alone)")
    assert "reformer-text-1" in series, "the chosen run stands beside the mean of its seeds"
    bands = opened.run("zoo.charts.charts.find(each => each.key === 'learning').spec.series.filter(each => each.low)")
    assert len(bands) == 5
    assert all(low < high for band in bands for low, high in zip(band["low"][-3:], band["high"][-3:]))
    assert opened.run("zoo.by('details').innerText").startswith("reformer, text, 512 tokens, seed 1")


def test_a_point_of_a_chart_chooses_its_run(opened: Browser) -> None:
    seen(opened, "pareto-time")
    opened.click('.plot[data-figure="quality"] .trace:nth-child(2) .points path:first-child')
    key = opened.run("zoo.state.get().run")
    assert key.startswith("bigbird-text-")
    assert f"run={key}" in opened.run("location.hash")


def test_the_keyboard_reaches_everything(opened: Browser) -> None:
    opened.press("/")
    assert opened.run("document.activeElement.id") == "search"
    opened.run("document.querySelector('.runs tr[tabindex=\"0\"]').focus()")
    for _ in range(2):
        opened.press("ArrowDown")
    third = opened.run("document.activeElement.dataset.key")
    assert third == rows()[2]["id"]
    opened.press("Enter")
    assert opened.run("zoo.state.get().run") == third
    assert not opened.run("zoo.by('details').hidden")
    opened.press("Escape")
    assert opened.run("zoo.by('details').hidden")
    opened.run(f"document.querySelector('.runs tr[data-key=\"{third}\"]').focus()")
    opened.press(" ")
    assert opened.run("zoo.state.get().vs") == [third]
    nameless = """[...document.querySelectorAll('button, input, select, summary, [role=img]')].filter(node =>
        !(node.innerText || node.getAttribute('aria-label') || node.closest('label')?.innerText)
    ).map(node => node.outerHTML)"""
    assert opened.run(nameless) == [], "everything has a name for those who listen"


def test_two_runs_are_compared_field_by_field(opened: Browser) -> None:
    opened.run("zoo.state.change({vs: ['full-text-0', 'hostile']})")
    opened.click("#compare")
    fields = opened.run("[...document.querySelectorAll('.diff tbody tr')].map(line => line.dataset.field)")
    assert {"mechanism", "seed", "status", "attention.name", "note"} <= set(fields)
    assert "environment.cpu" not in fields, "what is the same is not told"
    told = opened.run("document.querySelector('.diff tr[data-field=note]').innerText")
    assert HOSTILE in told


def test_hostile_text_stays_text(opened: Browser) -> None:
    opened.run("zoo.link.choose('hostile')")
    seen(opened, "memory")
    assert HOSTILE in opened.run("zoo.by('details').innerText")
    opened.run("zoo.state.change({by: 'note'})")
    seen(opened, "learning")
    assert opened.run("document.querySelectorAll('img, .plot b').length") == 0


def test_what_is_shown_can_be_taken_away(opened: Browser) -> None:
    opened.run("zoo.state.change({where: {mechanism: ['longformer'], kind: ['cost']}, sort: '-seconds'})")
    opened.click("#csv")
    lines = list(csv.DictReader(io.StringIO(opened.downloaded("runs.csv").decode())))
    assert [line["length"] for line in lines] == [str(length) for length in reversed(LENGTHS)]
    assert float(lines[-1]["seconds"]) == pytest.approx(speed("longformer", "auto", 256)["seconds"], 1e-4)
    seen(opened, "time")
    opened.click('.card[data-chart="time"] .tools button:first-child')
    points = list(csv.reader(io.StringIO(opened.downloaded("time.csv").decode())))
    assert [line[1] for line in points[1:]] == [str(length) for length in LENGTHS]
    opened.click('.card[data-chart="time"] .tools button:last-child')
    assert opened.downloaded("time.png").startswith(b"\x89PNG")
    assert opened.run("zoo.csv([['=1+1', -1, 'a,\"b', null]])") == '\'=1+1,-1,"a,""b",\n'


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 900, 390])
def test_nothing_is_wider_than_the_screen(tab: Browser, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    tab.said.clear()
    tab.open(page.as_uri(), width, 900, dark=dark)
    seen(tab, "memory")
    picture = tmp_path / "screen.png"
    picture.write_bytes(tab.picture())
    assert picture.stat().st_size > 10_000
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(23, 26, 31)" if dark else "rgb(254, 254, 254)")
    fill = tab.run("document.querySelector('.plot[data-figure=memory] .main-svg').style.background")
    assert fill == paper
    tab.run("zoo.link.choose('reformer-text-1')")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.said == []


def test_the_theme_can_be_chosen_and_is_in_the_address(opened: Browser) -> None:
    for theme in ("dark", "light"):
        opened.click("#theme")
        assert opened.run("document.documentElement.dataset.theme") == theme
        assert f"theme={theme}" in opened.run("location.hash")


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext is installed")
def test_on_paper_nothing_is_cut_off(opened: Browser, tmp_path: Path) -> None:
    paper = opened.paper(tmp_path / "report.pdf")
    said = subprocess.run(["pdftotext", paper, "-"], capture_output=True, text=True, timeout=60, check=True).stdout
    # what lies beyond the edge of the paper is not in the file; this is the heading of the last columns of the summary
    assert "Model" in said.split()
    assert "Quality against memory" in said
    assert "transformer_xl" in said


def test_means_bands_and_axes_are_right(opened: Browser) -> None:
    assert opened.run("zoo.gather.means([[4, 1, 'a'], [1, 2, 'a'], [4, 3, 'b']])") == {
        "x": [1, 4], "y": [2, 2], "low": [2, 1], "high": [2, 3], "keys": [["a"], ["a", "b"]], "counts": [1, 2],
    }  # fmt: skip
    curves = "[{x: [0, 10, 20], y: [0, 10, 20], key: 'a'}, {x: [0, 20], y: [10, 10], key: 'b'}]"
    found = opened.run(f"zoo.gather.curves({curves})")
    assert (found["x"], found["y"]) == ([0, 10, 20], [5, 10, 15])
    assert (found["low"], found["high"]) == ([0, 10, 10], [10, 10, 20])
    axis = opened.run("zoo.gather.logAxis('', [5e6, 3e9], zoo.words.size, {binary: true})")
    assert axis["ticktext"] == ["4 MiB", "16 MiB", "64 MiB", "256 MiB", "1 GiB", "4 GiB"]
    words = (
        "[zoo.words.seconds(0.00123), zoo.words.seconds(600), zoo.words.size(3.5 * 2 ** 30), zoo.words.millions(812e3)]"
    )
    assert opened.run(words) == ["1.23 ms", "10.0 min", "3.50 GiB", "812 k"]
    assert opened.run("['10', null, '9', 'b', 'a'].sort(zoo.order)") == ["9", "10", "a", "b", None]


def test_five_hundred_runs_load_in_three_seconds_and_filter_in_a_tenth(tab: Browser, tmp_path: Path) -> None:
    many: list[dict[str, Any]] = []
    for number in range(480):
        backend = ("full", "longformer", "bigbird", "reformer", "transformer_xl")[number % 5]
        row = quality(backend, ("text", "mqar")[number // 240], number // 10 % 6, id=f"run-{number}")
        row["config"] = {"attention": {"name": backend}, "optimizer": {"lr": 0.001 * (1 + number // 60 % 4)},
                         **{f"option_{n}": n * (number % 3 + 1) for n in range(60)}}  # fmt: skip
        row["curve"] = [[step, row["curve"][0][1] / (1 + step / 50)] for step in range(0, 5000, 10)]
        many.append(row)
    many += [speed("longformer", "auto", n) for n in LENGTHS] + [speed("full", "sdpa", n) for n in LENGTHS]
    path = build_report([*many, *(portrait(name) for name in ("full", "longformer"))], tmp_path / "many.html")
    assert path.stat().st_size < 6e6
    before = tab.cpu_seconds()
    tab.open(path.as_uri())
    assert tab.cpu_seconds() - before < 3
    took: dict[str, list[float]] = {}
    for name in ("bigbird", "full", "reformer", "longformer") * 4:
        before = tab.cpu_seconds()
        tab.run(f"zoo.facets.toggle('mechanism', '{name}')")
        took.setdefault(name, []).append(tab.cpu_seconds() - before)
        tab.settle()
    assert all(min(times) < 0.1 for times in took.values()), took
    tab.run("zoo.state.change(zoo.state.blank())")
    assert tab.run("document.querySelectorAll('.runs tr[data-key]').length") < 80, "rows out of sight are not there"
    assert tab.said == []


def test_a_broken_script_would_be_noticed(tab: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("Plotly.react(", "Plotly.reackt("))
    tab.open(broken.as_uri())
    tab.show("#charts .card")
    tab.until("window.waited = (window.waited ?? 0) + 1, window.waited > 20")
    assert any("reackt" in line for line in tab.said), json.dumps(tab.said)
    tab.said.clear()
