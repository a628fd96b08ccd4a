"""Charts of distance, length and context in a real browser: what is drawn is what the rows say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import CHROMIUM, Browser, browser
from report_rows import quality

from attention_zoo.report import build_report
from attention_zoo.report.contexts import Group

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

SPEC = "zoo.charts.charts.find(each => each.key === {!r}).spec"


def run(backend: str, seed: int, longer: float) -> dict[str, Any]:
    """A training at 64 tokens that was tested at 128, too."""
    near, far = [[1, 1.0, 0.1, 50], [8, 0.75, 0.1, 50]], [[1, 1.0, 0.1, 50], [100, longer, 0.1, 50]]
    by_set = {
        "validation": {"seq_len": 64, "by_group": {"distance": [[1, 0.0, 0.1, 50]]}, "loss_by_position": []},
        "test": {"seq_len": 64, "by_group": {"distance": near}, "loss_by_position": []},
        "test@longer": {"seq_len": 128, "by_group": {"distance": far}, "loss_by_position": []},
    }
    scores = {
        name: {"accuracy": value} for name, value in (("validation", 0.0), ("test", 0.9), ("test@longer", longer))
    }
    return quality(backend, "mqar", seed, evaluations=scores, by_set=by_set, by_group=by_set["test"]["by_group"],
                   metrics={"accuracy": 0.9, "loss": 1.0}, metric="accuracy", better="higher", seq_len=64)  # fmt: skip


def text(backend: str) -> dict[str, Any]:
    curve = [[8, 2.0], [24, 1.5]]
    by_set = {
        "test": {"seq_len": 512, "by_group": {}, "loss_by_position": curve},
        "test@longer": {"seq_len": 1024, "by_group": {}, "loss_by_position": [[16, 1.9], [900, 1.25]]},
    }
    scores = {"test": {"bits_per_byte": 2.5}, "test@longer": {"bits_per_byte": 2.25}}
    return quality(backend, "text", 0, evaluations=scores, by_set=by_set, loss_by_position=curve)


def group() -> Group:
    reach = [{"share": share, "tokens": 16, "falls": share < 1, "gains": [0.25, 0.005]} for share in (0.1, 1.0)]
    models = [
        {"name": name, "backend": name, "id": f"{name}-text-0", "bits_per_byte": [3.0, 2.5, 2.25], "reach": reach}
        for name in ("full", "longformer")
    ]
    return {"kind": "context", "contexts": [8, 16, 24], "positions": 99, "threshold": 0.01, "runs": models}  # type: ignore[typeddict-item]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    rows = [run("full", 0, 0.8), run("full", 1, 0.6), run("longformer", 0, 0.2), run("longformer", 1, 0.2)]
    rows += [text("full"), text("longformer")]
    page = build_report(rows, tmp_path_factory.mktemp("page") / "report.html", contexts=[("group", group())])
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        tab.open(page.as_uri())
        yield tab
        assert tab.said == []


def drawn(tab: Browser, chart: str, part: str) -> Any:
    tab.settle()
    tab.place(f'.plot[data-figure="{chart}"]')
    tab.until(f"document.querySelector('.plot[data-figure=\"{chart}\"] .main-svg') !== null")
    return json.loads(tab.run(f"JSON.stringify({SPEC.format(chart)}.{part} ?? null)"))


def test_the_map_has_a_line_for_each_mechanism_and_length(opened: Browser) -> None:
    opened.run("zoo.state.change({task: 'mqar, 64 tokens'})")
    found = drawn(opened, "distance", "heat")
    lines = dict(zip(found["y"], found["z"]))
    assert found["x"] == ["1", "8", "100"]
    assert lines == {
        "full · 64 tokens": [1, 0.75, None], "full · 128 tokens": [1, None, 0.7],
        "longformer · 64 tokens": [1, 0.75, None], "longformer · 128 tokens": [1, None, 0.2],
    }  # fmt: skip
    assert opened.run("document.querySelectorAll('.card[data-chart=\"distance\"] .hm').length") >= 1


def test_the_map_by_length_is_of_the_same_figures(opened: Browser) -> None:
    opened.run("zoo.state.change({task: 'mqar, 64 tokens', grouping: '(length)'})")
    found = drawn(opened, "distance", "heat")
    assert found["x"] == ["64", "128"]
    assert dict(zip(found["y"], found["z"])) == {"full": [0.9, 0.7], "longformer": [0.9, 0.2]}
    opened.run("zoo.state.change({grouping: ''})")


def test_tested_long_is_drawn_with_the_trained_length_marked(opened: Browser) -> None:
    opened.run("zoo.state.change({task: 'mqar, 64 tokens'})")
    series = drawn(opened, "lengths", "series")
    assert {each["name"]: (each["x"], each["y"]) for each in series} == {
        "full": ([64, 128], [0.9, pytest.approx(0.7)]), "longformer": ([64, 128], [0.9, pytest.approx(0.2)]),
    }  # fmt: skip
    assert [each["x0"] for each in drawn(opened, "lengths", "shapes")] == [64]
    places = opened.run(
        "(() => { const plot = document.querySelector('.plot[data-figure=\"lengths\"]');"
        "const box = node => { const {x, width} = node.getBoundingClientRect(); return x + width / 2; };"
        "return [box(plot.querySelector('.shapelayer path')), box(plot.querySelector('.points path'))]; })()"
    )
    assert abs(places[0] - places[1]) < 2, "the dotted line stands at the trained length, on an axis of logarithms"


def test_loss_by_position_is_of_the_set_that_is_chosen(opened: Browser) -> None:
    opened.run("zoo.state.change({task: 'text, 512 tokens'})")
    assert [each["x"] for each in drawn(opened, "position", "series")] == [[8, 24]] * 2
    opened.run("zoo.state.change({set: 'test@longer'})")
    assert [each["x"] for each in drawn(opened, "position", "series")] == [[16, 900]] * 2
    assert "set test@longer" in drawn(opened, "position", "note")
    assert [each["y"] for each in drawn(opened, "lengths", "series")] == [[2.5, 2.25]] * 2, "bits per byte, too"


def test_context_is_drawn_in_bits_and_in_gains(opened: Browser) -> None:
    series = drawn(opened, "context", "series")
    assert {each["name"]: (each["x"], each["y"]) for each in series} == {
        name: ([8, 16, 24], [3.0, 2.5, 2.25]) for name in ("full", "longformer")
    }
    assert "full 16 / ≥ 16, longformer 16 / ≥ 16" in drawn(opened, "context", "note")
    opened.run("zoo.state.change({context: '0.1'})")
    assert [(each["x"], each["y"]) for each in drawn(opened, "context", "series")] == [([8, 16], [0.25, 0.005])] * 2
    assert [each["y0"] for each in drawn(opened, "context", "shapes")] == [0.01]
    assert set("".join(opened.run("zoo.select.looks()['full']"))) == set("".join(series[0]["style"]))
