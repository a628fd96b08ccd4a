"""What was inspected stands in the dashboard: read from folders, checked, and drawn beside the runs that it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Browser, browser
from report_page import data_of
from report_rows import made_up

from attention_zoo.files import write_atomic
from attention_zoo.report.again import ReportConfig, report
from attention_zoo.report.inspected import inspected
from attention_zoo.report.serve import Watched

HOSTILE = "</script><b>bold</b>"


def layer_of(number: int, heads: int, shift: float) -> dict[str, Any]:
    lines = [[0.9 * (i == j) + 0.1 * (j == 0) for j in range(4)] for i in range(4)]
    some = [shift + number + head for head in range(heads)]
    return {
        "layer": f"layer {number}", "blocks": [lines] * heads, "mass": [1.0] * heads, "sinks": [0.1] * heads,
        "distance": some, "entropy": None, "outside": [0.25] * heads,
    }  # fmt: skip


def attention(*runs: tuple[str, str | None, str | None], text: str = "def main():") -> dict[str, Any]:
    seen = [
        {"name": name, "backend": backend, "id": key, "layers": [layer_of(n, 2, at) for n in range(2)]}
        for at, (name, backend, key) in enumerate(runs)
    ]
    return {"kind": "attention", "text": text, "window": 64, "sinks": 4, "tokens": 11, "runs": seen}


def written(folder: Path) -> Path:
    """A sweep whose runs were inspected, once with one that is not in it."""
    rows = [json.dumps(row) for row in made_up(2)]
    write_atomic(folder / "results.jsonl", "\n".join(rows) + "\n")
    both = ("a", "full", "full-text-0"), ("b", "longformer", "longformer-text-1")
    write_atomic(folder / "seen" / "attention.json", json.dumps(attention(*both)))
    other = attention(("elsewhere", "global_tokens", None), text=HOSTILE)
    write_atomic(folder / "z" / "attention.json", json.dumps(other))
    return folder


def test_the_page_holds_what_was_inspected(tmp_path: Path) -> None:
    written(tmp_path)
    path = report(ReportConfig(runs=str(tmp_path)))
    assert path is not None
    data = data_of(path.read_text())
    first, second = data["attention"]
    assert first["title"] == "seen: def main():"
    assert [(run["key"], run["label"]) for run in first["runs"]] == [
        ("full-text-0", "full"), ("longformer-text-1", "longformer"),
    ]  # fmt: skip
    assert second["runs"][0]["key"] is None
    assert "global_tokens" in data["styles"], "a run of no row has its mechanism's colour"
    layer = first["runs"][1]["layers"][1]
    assert layer["distance"] == [2.0, 3.0]
    assert layer["entropy"] is None
    peak, lines = layer["maps"][0]
    assert peak == 1.0
    assert lines[0] == "/AAA"
    assert lines[2] == "UA8A", "shades grow with the root of the weight"
    assert HOSTILE not in path.read_text()
    live = json.loads(Watched([str(tmp_path)], "").data()[1])
    assert live["data"]["attention"] == data["attention"]


def test_a_file_that_is_none_is_named_and_left_out(tmp_path: Path) -> None:
    good, lacking, shape = attention(("a", "full", None)), attention(("a", "full", None)), attention(("a", None, None))
    del lacking["runs"][0]["layers"][0]["mass"]
    shape["runs"][0]["layers"][0]["blocks"][0][1].pop()
    for name, value in {"good": good, "lacking": lacking, "shape": shape}.items():
        write_atomic(tmp_path / name / "attention.json", json.dumps(value))
    write_atomic(tmp_path / "torn" / "attention.json", "{")
    write_atomic(tmp_path / ".hidden" / "attention.json", "{")
    found = inspected([tmp_path])
    assert [folder for folder, _ in found.inspections] == ["good"]
    said = {Path(each.where).parent.name: each.what for each in found.left_out}
    assert set(said) == {"lacking", "shape", "torn"}
    assert said["lacking"] == "runs.0.layers.0.mass: Field required"
    assert said["shape"] == "a, layer 0: blocks must be rectangles of one shape"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("blocks", 0, 0, 0), "nan", "runs.0.layers.0.blocks.0.0.0: Input should be a finite number"),
        (("blocks", 0, 0, 0), "inf", "runs.0.layers.0.blocks.0.0.0: Input should be a finite number"),
        (("blocks", 0), [], "runs.0.layers.0.blocks.0: List should have at least 1 item after validation, not 0"),
        (("blocks", 0), [[]], "runs.0.layers.0.blocks.0.0: List should have at least 1 item after validation, not 0"),
        (("distance", 1), "nan", "runs.0.layers.0.distance.1: Input should be a finite number"),
        (("mass", 0), "-inf", "runs.0.layers.0.mass.0: Input should be a finite number"),
    ],
)
def test_figures_that_no_chart_can_show_cost_their_file_alone(
    place: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    """A model whose weights went wrong is inspected, too, and its file says "nan"."""
    seen = attention(("a", "full", None))
    at = seen["runs"][0]["layers"][0]
    for each in place[:-1]:
        at = at[each]
    at[place[-1]] = value
    write_atomic(tmp_path / "odd" / "attention.json", json.dumps(seen))
    write_atomic(tmp_path / "results.jsonl", "\n".join(json.dumps(row) for row in made_up()) + "\n")
    (left,) = inspected([tmp_path]).left_out
    assert left.what == said
    path = report(ReportConfig(runs=str(tmp_path)))
    assert path is not None
    assert said in path.read_text()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Browser]:
    path = report(ReportConfig(runs=str(written(tmp_path))))
    assert path is not None
    with browser(tmp_path / "browser") as tab:
        tab.open(path.as_uri())
        yield tab
        assert tab.said == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_heads_stand_beside_each_other_and_follow_the_filters(opened: Browser) -> None:
    shown = "[...document.querySelectorAll('#heads .picture')].map(node => [node.dataset.group, node.dataset.head])"
    opened.settle()
    assert opened.run(shown) == [["full", "0"], ["longformer", "0"], ["full", "1"], ["longformer", "1"]]
    opened.run("zoo.state.change({layer: '1'})")
    opened.settle()
    assert opened.run("document.querySelector('#heads .picture').dataset.layer") == "layer 1"
    numbers = opened.run("document.querySelector('#heads .picture:nth-child(2) canvas').getAttribute('aria-label')")
    assert numbers.startswith("longformer, layer 1, head 0: mean distance in tokens 2.00, share beyond the window 25")
    shade = """(() => {
        const canvas = document.querySelector('#heads canvas'), size = canvas.width / 4;
        const {data} = canvas.getContext('2d').getImageData(0, 2 * size + 1, canvas.width, 1);
        return [0, 1, 2].map(block => [...data.slice(4 * block * size, 4 * block * size + 3)].join());
    })()"""
    assert len(set(opened.run(shade))) == 3, "nothing, little and much look different"
    opened.place('.plot[data-figure="heads"]')
    opened.until("document.querySelector('.plot[data-figure=heads] .main-svg') !== null")
    series = "zoo.charts.charts.find(each => each.key === 'heads').spec.series.map(each => [each.name, each.y])"
    assert opened.run(series) == [["full", [0, 1, 1, 2]], ["longformer", [1, 2, 2, 3]]]
    opened.run("zoo.state.change({look: 'sinks'})")
    opened.settle()
    assert opened.run(series)[1] == ["longformer", [0.1] * 4]
    opened.run("zoo.state.change({where: {mechanism: ['longformer']}})")
    opened.settle()
    assert opened.run(shown) == [["longformer", "0"], ["longformer", "1"]]
    opened.click("#heads .choices button")
    assert opened.downloaded("heads.csv").decode().splitlines()[1] == "longformer,b,layer 0,tokens,0,1,,0.25,0.1,1,"
    opened.run("zoo.state.change({where: {}, seen: '1'})")
    opened.settle()
    assert opened.run(shown) == [["global_tokens", "0"], ["global_tokens", "1"]]
    assert HOSTILE in opened.run("document.querySelector('#heads .note').textContent")
    assert "seen=1" in opened.run("location.hash")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
