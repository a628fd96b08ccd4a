"""All that one page claims about one task is one family: the report's verdicts and the matrix's are the same."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from report_page import text_of
from report_rows import quality

from attention_zoo.advice.gaps import gaps
from attention_zoo.advice.kinds import KINDS, kinds_of
from attention_zoo.report import Findings, build_report, headline, reach
from attention_zoo.report.quality import tasks
from attention_zoo.report.reach import BY_REACH
from attention_zoo.report.rows import sift
from attention_zoo.report.verdicts import compare, compared, verdicts_table
from attention_zoo.statistics import preset_seeds
from attention_zoo.statistics.family import decide
from attention_zoo.statistics.paired import p_different, p_equivalent
from attention_zoo.statistics.power import ALPHA

WINDOWS = (4, 8, 16, 32)
DRAWS = 4000


def recall(window: int | None, seed: int, near: float, far: float, **changes: Any) -> dict[str, Any]:
    """Answers up to 64 tokens back, of which a mechanism sees those within its window; full attention: None."""
    edge = window or 16
    bins = [[at, near if at <= edge else far, 1.0, 100] for at in (1, 2, 4, 8, 16, 32, 64)]
    score = {"accuracy": sum(share for _, share, *_ in bins) / len(bins)}
    backend = "full" if window is None else "longformer"
    row = quality(backend, "mqar", seed, metrics={**score, "loss": 1.0}, evaluations={"test": score})
    options = {"name": backend} if window is None else {"name": backend, "window": window}
    row |= {"curve": [], "quality_curve": [], "config": {"attention": options}, "id": f"{backend}-{window}-{seed}"}
    return row | {"by_group": {"distance": bins}} | changes


def page(random: np.random.Generator, shift: float = 0.0, spread: float = 0.003) -> list[dict[str, Any]]:
    """Full attention and four windows; the first is `shift` worse beyond its reach."""
    rows = []
    for seed in range(7):
        together = 0.975 + 0.002 * random.normal()
        for window in (None, *WINDOWS):
            near, far = together + spread / math.sqrt(2) * random.normal(size=2)
            rows.append(recall(window, seed, near, far - shift * (window == WINDOWS[0])))
    return rows


def test_the_matrix_tells_what_the_report_tells() -> None:
    rows = sift(page(np.random.default_rng(0), 0.02))
    said = {(each.learnt.label, each.comparison.part): each for each in compared(tasks(rows)[0])}
    cells = [gap for gap in gaps(rows, kinds_of("recall")).values() if not gap.reference]
    assert len(said) == len(cells) == 8
    for gap in cells:
        mine = said[gap.line.label, gap.kind.part]
        assert (gap.verdict, gap.edge, gap.family) == (mine.verdict, mine.comparison.edge, 8)
        assert gap.judged == mine.kind
    assert {each.kind for each in said.values()} >= {"worse"}


def test_recall_is_told_by_reach_in_words_and_tables(tmp_path: Any) -> None:
    rows = page(np.random.default_rng(0), 0.02)
    sentence = headline(Findings.of(rows))[-1]
    assert re.search(
        r"longformer \(window=4\) [\d.]+ %, up to 4 back [^;]+, over 4 back worse than full by [\d.]+ points", sentence
    )
    lines = [line[0] for line in verdicts_table(tasks(rows)[0]).cells]
    assert lines[:2] == ["longformer (window=16), up to 16 back", "longformer (window=16), over 16 back"]
    assert "over 4 back worse than full by" in text_of(build_report(rows, tmp_path / "report.html").read_text())


def test_of_a_hundred_pages_of_equal_mechanisms_hardly_any_claims_a_difference_anywhere() -> None:
    random, wrong = np.random.default_rng(1), 0
    for _ in range(100):
        rows = sift(page(random))
        report = [each.kind for each in compared(tasks(rows)[0])]
        matrix = [gap.judged for gap in gaps(rows, kinds_of("recall")).values()]
        wrong += any(kind in ("better", "worse") for kind in (*report, *matrix))
    assert wrong <= 10


def test_of_unequal_ones_most_pages_say_which_and_where() -> None:
    """Two standard deviations of the paired differences, beyond the reach of one of four."""
    random, right = np.random.default_rng(2), 0
    for _ in range(60):
        found = compared(tasks(page(random, 0.006))[0])
        right += any(each.kind == "worse" and each.where == "over 4 back " for each in found)
    assert right / 60 >= 0.8 - 2 * math.sqrt(0.16 / 60)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_a_whole_page_is_false_in_one_of_twenty(shared: float, margin: float) -> None:
    """Both sides of four mechanisms, which share their seed, full attention and, in part, what a side has of the whole;
    half of them differ by the margin itself, where "as good" is false."""
    random = np.random.default_rng(int(10 * shared))
    seeds = preset_seeds(8)
    whole = random.normal(size=(DRAWS, 5, 1, seeds))
    sides = math.sqrt(shared) * whole + math.sqrt(1 - shared) * random.normal(size=(DRAWS, 5, 2, seeds))
    noise = (sides[:, 1:] - sides[:, :1]).reshape(DRAWS, 8, seeds)
    for away in (0, 4, 7):
        shift = np.where(np.arange(8) < away, margin, 0.0)
        given = noise + shift[:, None]
        different, equivalent = decide(p_different(given), p_equivalent(given, margin))
        false = np.where(shift == 0, different, equivalent).any(-1).mean()
        assert false <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / DRAWS)
    given = noise / noise.std() + np.where(np.arange(8) == 0, 2.0, 0.0)[:, None]
    different, _ = decide(p_different(given), p_equivalent(given, 0.1))
    assert different[:, 0].mean() >= 0.8 - 3 * math.sqrt(0.16 / DRAWS), "with the seeds that the report asks for"


def test_answers_that_do_not_make_up_the_accuracy_leave_it_a_comparison_of_its_own() -> None:
    random = np.random.default_rng(3)
    rows = page(random)
    for row in rows:
        row["metrics"]["accuracy"] -= 0.02 * (row["config"]["attention"].get("window") == 4)
    found = compare(tasks(rows)[0])
    parts: dict[str, list[str]] = {}
    for each in found:
        parts.setdefault(each.learnt.label, []).append(each.comparison.part)
    assert parts.pop("longformer (window=4)") == ["all", "within", "beyond"]
    assert all(many == ["within", "beyond"] for many in parts.values())
    assert {each.family for each in found} == {9}
    assert [each.kind for each in found if each.comparison.part == "all"] == ["worse"]


def test_one_side_stands_for_the_whole_only_where_all_answers_are_on_it() -> None:
    rows = [recall(window, seed, 0.98 + 0.001 * seed, 0.98) for window in (None, 63, 40) for seed in range(7)]
    found = compare(tasks(rows)[0])
    parts = [(each.learnt.label, each.comparison.part) for each in found]
    assert parts == [
        ("longformer (window=40)", "all"), ("longformer (window=40)", "within"), ("longformer (window=63)", "within")
    ]  # fmt: skip
    hashed = [row | {"given": {"layer_reach": 63, "reach": 63, "length": 64}} for row in rows]
    for row in hashed:
        row["config"]["attention"].pop("window", None)
        row["config"]["attention"]["chunk"] = 16
    assert {each.comparison.part for each in compare(tasks(hashed)[0])} == {"within"}


def test_columns_of_one_side_are_those_of_tasks_that_are_told_so() -> None:
    assert {kind.task for kind in KINDS if kind.part != "all"} == BY_REACH
    assert not {kind.task for kind in KINDS if kind.part == "all"} & BY_REACH


def test_answers_of_a_bin_that_is_named_beyond_the_row_are_within_a_reach_of_the_whole_row() -> None:
    row: Any = {"seq_len": 64, "by_group": {"distance": [[32, 1.0, 0.0, 10], [64, 0.5, 0.0, 30]]}}
    assert reach.accuracy(row, 63, beyond=False) == 25 / 40
    assert reach.accuracy(row, 63, beyond=True) is None
    assert reach.accuracy(row, 62, beyond=False) == 1.0
