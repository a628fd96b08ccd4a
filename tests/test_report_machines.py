"""Seeds that ran on several machines: one comparison of pairs that are each of one machine, and figures that stand
apart beside costs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from report_page import text_of
from report_rows import ENVIRONMENT, quality, speed

from attention_zoo.advice.gaps import gaps
from attention_zoo.advice.kinds import kinds_of
from attention_zoo.report import Findings, build_report, headline
from attention_zoo.report.machines import several
from attention_zoo.report.quality import Task, tasks
from attention_zoo.report.rows import sift
from attention_zoo.report.summary import summary
from attention_zoo.report.verdicts import compare, compared, verdicts_table
from attention_zoo.statistics import Pairs

MACHINES = ("Made-up CPU", "Other CPU")
BACKENDS = ("full", "longformer", "bigbird", "reformer", "transformer_xl")


def run(backend: str, seed: int, score: float, machine: str = MACHINES[0], **changes: Any) -> dict[str, Any]:
    """A training without curves."""
    name = f"{backend}-{seed}-{machine}-{len(changes)}"
    metric = {"bits_per_byte": float(score)}
    row = quality(backend, "text", seed, metrics={**metric, "loss": 1.0}, evaluations={"test": metric}, id=name)
    row |= {"curve": [], "quality_curve": [], "loss_by_position": [], "environment": {**ENVIRONMENT, "cpu": machine}}
    return row | changes


def split(random: np.random.Generator, gaps: list[float], where: list[int]) -> list[dict[str, Any]]:
    """Gaps in standard deviations of the paired differences; each seed on the machine of that number, which does more
    to all than any gap is."""
    machine = 0.3 * random.normal(size=2)
    seeds = 2.3 + 0.05 * random.normal(size=len(where))
    noise = 0.02 / np.sqrt(2) * random.normal(size=(1 + len(gaps), len(where)))
    return [
        run(backend, seed, seeds[seed] + machine[where[seed]] + shift * 0.02 + noise[number, seed],
            MACHINES[where[seed]])
        for number, (backend, shift) in enumerate(zip(BACKENDS, [0.0, *gaps])) for seed in range(len(where))
    ]  # fmt: skip


def one(rows: list[dict[str, Any]]) -> Task:
    (task,) = tasks(rows)
    return task


@pytest.mark.parametrize("where", [[0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0], [0] * 7])
def test_equal_mechanisms_are_hardly_ever_told_apart_and_unequal_ones_mostly(where: list[int]) -> None:
    random = np.random.default_rng(sum(where))
    equal = [compared(one(split(random, [0.0] * 4, where))) for _ in range(30)]
    assert sum(any(each.verdict.different for each in found) for found in equal) <= 3
    unequal = [compared(one(split(random, [2.0, 0.0, -2.0, 0.0], where))) for _ in range(30)]
    kinds = [{each.learnt.backend: each.kind for each in found} for found in unequal]
    assert sum(found["longformer"] == "worse" for found in kinds) >= 24
    assert sum(found["reformer"] == "better" for found in kinds) >= 24


def test_no_pair_is_of_two_machines() -> None:
    rows = [run("full", seed, 2.3) for seed in range(7)] + [
        run("longformer", seed, 2.4 + 0.001 * seed, MACHINES[1]) for seed in range(7)
    ]
    task = one(rows)
    assert [len(each.verdict.pairs) for each in compare(task)] == [0]
    assert task.obstacles()[0] == "no verdict: the runs differ in more than the mechanism (cpu)"
    assert compared(task) == []
    rows += [run("full", seed, 2.3 + 0.002 * seed, MACHINES[1]) for seed in range(2)]
    (found,) = compare(one(rows))
    assert found.verdict.pairs.differences == pytest.approx([0.1, 0.099])
    assert found.verdict.pairs.unpaired == 5
    assert "[without 5 seeds that not both have in one place]" in found.words()


def test_pairs_over_places_are_those_of_each_place() -> None:
    found = Pairs.over([
        ([(0, 1.0), (1, 2.0), (2, 9.0)], [(0, 0.5), (1, 1.0)]),
        ([(1, 5.0), (3, 7.0), (4, 1.0)], [(1, 2.0), (3, 6.0), (2, 4.0)]),
    ])  # fmt: skip
    assert found.differences == (0.5, 2.0, 1.0), "that of seed 1 is the mean of 1 and 3"
    assert found.unpaired == 2, "seeds 2 and 4"
    assert Pairs.over([([(0, 1.0)], [(0, float("nan"))]), ([(0, 1.0)], [(0, 0.5)])]).broken == 1
    assert Pairs.over([]) == Pairs(())


def test_a_seed_that_ran_on_both_machines_counts_once() -> None:
    """Twice the same three seeds are three draws, and no six."""
    random = np.random.default_rng(0)
    once = split(random, [0.0], [0, 0, 0])
    twice = once + [
        run(row["backend"], row["seed"], row["metrics"]["bits_per_byte"] + 0.1, MACHINES[1]) for row in once
    ]
    (alone,), (both,) = compare(one(once)), compare(one(twice))
    assert both.verdict.pairs.differences == pytest.approx(alone.verdict.pairs.differences)
    assert both.several == "2 machines"


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 200}, {"config": {"attention": {"name": "longformer"}, "model": {"depth": 4}}},
        {"environment": {**ENVIRONMENT, "cpu": MACHINES[1], "source": "0123456789abcdef"}},
        {"config": {"attention": {"name": "longformer", "window": 3}}},
    ],
    ids=["steps", "config", "code", "options"],
)  # fmt: skip
def test_what_differs_in_more_than_the_machine_is_never_pooled(other: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    rows = split(random, [0.0], [0] * 4 + [1] * 3)
    for row in rows:
        if row["seed"] > 3 and row["backend"] == "longformer":
            row |= other
    first, second = sorted(compare(one(rows)), key=lambda each: min(row["seed"] for row in each.learnt.rows))
    assert (len(first.verdict.pairs), first.several) == (4, "")
    assert len(second.verdict.pairs) in (0, 3)
    other_options = "window" in str(other)
    assert (second.refusal is None) == other_options, "other options are another mechanism, and all else no comparison"


def test_the_page_says_of_how_many_machines_the_seeds_are(tmp_path: Any) -> None:
    rows = split(np.random.default_rng(2), [30.0], [0, 0, 0, 0, 1, 1, 1])
    for number, machine in enumerate(MACHINES):
        for backend, kernel in (("full", "sdpa"), ("longformer", "auto")):
            rows.append(
                speed(backend, kernel, 1024, id=f"{backend}-{machine}", seconds=1.0 + number,
                      environment={**ENVIRONMENT, "cpu": machine})
            )  # fmt: skip
    found = Findings.of(rows)
    said = headline(found)[-1]
    assert re.search(r"full [\d.]+ \([\d.–]+\) \[seeds of 2 machines\]; longformer [\d.]+, worse than full by ", said)
    assert said.endswith("[seeds of 2 machines].")
    (line,) = verdicts_table(found.tasks[0]).cells
    assert (line[0], line[2]) == ("longformer", "7 of 2 machines")
    table = summary(found)
    assert len([name for name in table.names if "longformer" in name]) == 2, "beside costs no figure is of both"
    page = text_of(build_report(rows, tmp_path / "report.html").read_text())
    assert "worse [seeds of 2 machines]" in page, "in the matrix"
    cells = gaps(sift(rows), kinds_of("text"))
    assert {gap.several for gap in cells.values()} == {"2 machines"}
    assert any("95 % interval of 7 seeds of 2 machines" in gap.plainly() for gap in cells.values() if not gap.reference)


def test_seeds_of_two_files_are_pooled_and_of_other_code_each_keeps_its_own_reference() -> None:
    random = np.random.default_rng(3)
    rows = split(random, [30.0], [0] * 7)
    files = [{**row, "from": "first" if row["seed"] < 4 else "second"} for row in rows]
    (found,) = compare(one(files))
    assert (found.several, len(found.verdict.pairs), found.kind) == ("2 files", 7, "worse")
    other = [
        {**row, "id": f"{row['id']}-old", "environment": {**ENVIRONMENT, "source": "0123456789abcdef"},
         "metrics": {"bits_per_byte": row["metrics"]["bits_per_byte"] + 1, "loss": 1.0}}
        for row in rows if row["seed"] < 5
    ]  # fmt: skip
    both = compare(one(rows + other))
    assert sorted(len(each.verdict.pairs) for each in both) == [5, 7]
    assert {each.kind for each in both} == {"worse"}
    assert {each.family for each in both} == {2}, "what one page says of one task is one family"
    single = compare(one(rows + [row for row in other if row["seed"] == 0]))
    assert sorted((len(each.verdict.pairs), each.family) for each in single) == [(1, 2), (7, 1)], (
        "one seed tells nothing"
    )


def test_what_several_places_are_called() -> None:
    place = (("cpu", "a"), ("file", "x"), ("torch", "1"))
    assert several([]) == several([place]) == several([place, place]) == ""
    assert several([place, (("cpu", "b"), *place[1:])]) == "2 machines"
    assert several([place, (*place[:2], ("torch", "2"))]) == "2 versions of torch"
    assert several([place, (place[0], ("file", "y"), place[2])]) == "2 files"
