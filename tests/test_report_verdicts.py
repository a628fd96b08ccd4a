"""Verdicts of the report, from its rows: as rarely false and as often true as promised, and why there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from report_page import html_of, text_of
from report_rows import quality

from attention_zoo.report import Findings, build_report, headline
from attention_zoo.report.convergence import LEVEL, still_learning, surely_seen, within_reach
from attention_zoo.report.extract import latex, tables
from attention_zoo.report.metrics import difference_words
from attention_zoo.report.quality import tasks
from attention_zoo.report.verdicts import MOST_TOLD, Compared, compared, sentence

OTHERS = ("longformer", "bigbird", "reformer", "transformer_xl")
BRIEF = {"curve": [], "quality_curve": [], "loss_by_position": []}
"""Rows of many draws do without."""


def rows_of(scores: dict[str, list[float]], on: str = "text", **changes: Any) -> list[dict[str, Any]]:
    """Rows of runs with these scores, a seed each."""
    metric = "bits_per_byte" if on == "text" else "accuracy"
    return [
        quality(backend, on, seed, metrics={metric: float(score), "loss": 1.0},
                evaluations={"test": {metric: float(score)}}, **changes)
        for backend, many in scores.items() for seed, score in enumerate(many)
    ]  # fmt: skip


def one(own: list[float], full: list[float], on: str = "text", **changes: Any) -> Compared:
    """The only comparison of two mechanisms."""
    (task,) = tasks(rows_of({"full": full, "longformer": own}, on, **changes))
    (found,) = compared(task)
    return found


def drawn_scores(random: np.random.Generator, gaps: list[float], spread: float = 0.02) -> dict[str, list[float]]:
    """Scores that share what their seed does, such that paired differences have the standard deviation `spread`."""
    together = 2.3 + 0.05 * random.normal(size=7)
    noise = spread / np.sqrt(2) * random.normal(size=(1 + len(gaps), 7))
    return {
        name: list(together + shift + each)
        for name, shift, each in zip(("full", *OTHERS), [0.0, *(gap * spread for gap in gaps)], noise)
    }


def rows_of_any(scores: dict[str, list[float]], on: str) -> list[dict[str, Any]]:
    """The same for mechanisms of any name."""
    return [
        {**row, "backend": name, "id": f"{name}-{row['seed']}", "config": {"attention": {"name": name}}}
        for name, many in scores.items() for row in rows_of({"full": many}, on, **BRIEF)
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 8])
@pytest.mark.parametrize("on", ["text", "mqar"])
def test_a_sentence_names_full_and_the_best_of_more_than_anyone_reads(on: str, seeds: int) -> None:
    """A sweep over options has hundreds of mechanisms; what is not named is counted, and stands in the table."""
    lower = on == "text"
    worst = 9.0 if lower else 0.96
    scores = {"full": [worst + 0.001 * seed for seed in range(seeds)]}
    for number in range(40):
        value = 1.0 + 0.1 * number if lower else 0.999 - 0.0005 * number
        scores[f"m{number:02}"] = [value + 0.0001 * seed for seed in range(seeds)]
    (task,) = tasks(rows_of_any(scores, on))
    said = sentence(task)
    assert re.findall(r"\bm\d\d\b", said) == [f"m{number:02}" for number in range(MOST_TOLD - 1)]
    assert re.search(r"\bfull\b", said)
    assert f"{41 - MOST_TOLD} more, in the table" in said
    few = {name: scores[name] for name in list(scores)[:MOST_TOLD]}
    (task,) = tasks(rows_of_any(few, on))
    assert len(re.findall(r"\bm\d\d\b", sentence(task))) == MOST_TOLD - 1
    assert " more" not in sentence(task)


def differs(sentence: str) -> list[str]:
    return re.findall(r"(better|worse) than full", sentence)


def test_of_a_hundred_reports_of_equal_mechanisms_hardly_any_tells_them_apart() -> None:
    random = np.random.default_rng(0)
    said = [headline(Findings.of(rows_of(drawn_scores(random, [0.0] * 4), **BRIEF)))[-1] for _ in range(100)]
    assert sum(bool(differs(each)) for each in said) <= 10


def test_of_a_hundred_reports_of_unequal_ones_most_say_which_is_worse() -> None:
    """Two standard deviations of the paired differences, in two of four mechanisms."""
    random = np.random.default_rng(1)
    found = [
        headline(Findings.of(rows_of(drawn_scores(random, [2.0, 0.0, -2.0, 0.0]), **BRIEF)))[-1] for _ in range(100)
    ]
    assert sum(bool(re.search(r"longformer [\d.]+, worse than full by", each)) for each in found) >= 75
    assert sum(bool(re.search(r"; reformer [\d.]+, better than full by", each)) for each in found) >= 75


def test_the_page_itself_says_so(tmp_path: Any) -> None:
    random = np.random.default_rng(2)
    page = build_report(rows_of(drawn_scores(random, [8.0, 0.0, 0.0, -8.0])), tmp_path / "report.html").read_text()
    text = text_of(page)
    assert re.search(r"longformer [\d.]+, worse than full by 0\.\d+ \(95 %: \+0\.\d+ to \+0\.\d+\)", text)
    assert re.search(r"transformer_xl [\d.]+, better than full by 0\.\d+ \(95 %: −0\.\d+ to −0\.\d+\)", text)
    assert "Mechanisms are not compared with one another." in text
    assert "95 % interval" in text
    assert not re.search(r"\brank|, then |≈ longformer", text)


def test_a_verdict_for_each_case_in_words() -> None:
    random = np.random.default_rng(3)
    full = list(2.3 + 0.01 * random.normal(size=7))
    noise = random.normal(size=7)
    noise -= noise.mean()

    def said(shift: float, spread: float) -> str:
        return one([f + shift + spread * e for f, e in zip(full, noise)], full).words()

    assert re.fullmatch(r"worse than full by 0\.100 \(95 %: \+0\.09\d to \+0\.10\d\)", said(0.1, 0.005))
    assert re.fullmatch(r"better than full by 0\.100 \(95 %: −0\.10\d to −0\.09\d\)", said(-0.1, 0.005))
    as_good = said(0.0001, 0.002)
    assert as_good.startswith("as good as full (within ± 0.01 bits per byte), difference +0.0001 (95 %: −0.00")
    both = said(0.003, 0.0005)
    assert both.startswith("worse than full by 0.0030 (95 %: ")
    assert both.endswith("), and yet as good (within ± 0.01 bits per byte)")
    assert re.fullmatch(
        r"no verdict: these 7 seeds could have shown 0\.0\d+; \d+ seeds would show the 0\.010 seen", said(0.0105, 0.02)
    )
    assert "more than 1,000 seeds would show the 0.0001 seen" in said(0.0001, 0.05)


def test_points_of_accuracy() -> None:
    full = [0.99, 0.985, 0.995, 0.98, 0.99, 0.985, 0.99]
    low = one([x - 0.5 - 0.01 * (i % 3) for i, x in enumerate(full)], full, "mqar")
    assert low.kind == "worse"
    assert re.fullmatch(r"worse than full by 50\.9 points \(95 %: −51\.\d to −50\.\d points\)", low.words())
    near = one([x + 0.001 * (i % 3 - 1) for i, x in enumerate(full)], full, "mqar")
    assert near.words().startswith("as good as full (within ± 1 point), difference ")
    assert difference_words(-0.0042, "accuracy", signed=True) == "−0.42 points"
    assert difference_words(0.25, "exact_match") == "25.0 points"


def test_identical_and_constant_values_have_plain_sentences() -> None:
    same = one([1.0] * 7, [1.0] * 7, "mqar")
    assert same.words() == "as good as full (within ± 1 point), difference +0.00 points"
    assert one([0.25] * 7, [1.0] * 7, "mqar").words() == "worse than full by 75.0 points"
    few = one([0.25] * 3, [1.0] * 3, "mqar")
    assert few.words() == (
        "no verdict: the same difference (−75.0 points) in all 3 seeds tells no spread, 7 are needed"
    )


def test_seeds_that_one_lacks_are_left_out_and_said() -> None:
    random = np.random.default_rng(4)
    scores = drawn_scores(random, [0.0])
    found = one(scores["longformer"][:5], scores["full"])
    assert found.words().endswith("[without 2 seeds that only one of both has]")
    alone = rows_of({"full": scores["full"][:3]}) + [
        {**row, "seed": row["seed"] + 10} for row in rows_of({"longformer": scores["longformer"][:2]})
    ]
    assert tasks(alone)[0].obstacles() == ["no verdict: one seed shows no difference, 7 are needed"]


def test_one_mechanism_with_one_seed_keeps_the_others_from_nothing() -> None:
    scores = drawn_scores(np.random.default_rng(5), [8.0, 0.0])
    (sentence,) = headline(Findings.of(rows_of(scores | {"bigbird": scores["bigbird"][:1]})))
    assert "bigbird" in sentence
    assert "no verdict: one seed shows no difference, 7 are needed for 2 comparisons [without 6 seeds" in sentence
    assert re.search(r"longformer [\d.]+, worse than full", sentence)


def test_one_seed_of_all_is_one_sentence() -> None:
    scores = {name: many[:1] for name, many in drawn_scores(np.random.default_rng(6), [8.0] * 4).items()}
    (sentence,) = headline(Findings.of(rows_of(scores)))
    assert sentence.endswith("(no verdict: one seed shows no difference, 7 are needed for 4 comparisons).")


def test_a_metric_without_a_margin_is_never_as_good() -> None:
    rows = rows_of({"full": [1.0] * 7, "longformer": [1.0] * 7}, "mqar")
    for row in rows:
        row |= {"metrics": {"of_ones_own": 0.5}, "metric": "of_ones_own", "better": "higher"}
    (task,) = tasks(rows)
    (found,) = compared(task)
    assert found.kind is None


def test_tasks_are_families_of_their_own_and_all_in_one_counts() -> None:
    """A difference that is shown alone is not shown among many, and another task's mechanisms take nothing away."""
    random = np.random.default_rng(8)
    spread = random.normal(size=7)
    spread = (spread - spread.mean()) / spread.std(ddof=1)
    full = list(2.3 + 0.01 * random.normal(size=7))
    scores = {"full": full, "longformer": [f + 0.013 + 0.01 * s for f, s in zip(full, spread)]}
    assert compared(tasks(rows_of(scores))[0])[0].kind == "worse", "t = 3.4"
    noise = {name: [f + 0.05 * e for f, e in zip(full, random.permutation(spread))] for name in OTHERS[1:]}
    other = rows_of({"full": [1.0] * 7} | dict.fromkeys(OTHERS, [0.5] * 7), "mqar")
    alone = {task.name: compared(task) for task in tasks(rows_of(scores) + other)}
    assert [each.kind for each in alone["text"]] == ["worse"]
    assert alone["text"][0].family == 1
    assert {each.family for each in alone["mqar"]} == {4}
    (many,) = tasks(rows_of(scores | noise))
    assert {each.learnt.label: each.kind for each in compared(many)}["longformer"] is None


def curve(fall: Callable[[float], float]) -> list[list[float]]:
    return [[step, fall(step / 300)] for step in range(10, 301, 10)]


LEVELS = curve(lambda x: 2 + 3 * np.exp(-12 * x))
FALLS = curve(lambda x: 5 - 2 * x)


def test_curves_that_still_fall_are_told_by_their_own_fall() -> None:
    last = [loss for step, loss in FALLS if step > 240]
    assert still_learning([{"curve": FALLS}]) == pytest.approx(2 * 0.2 / (FALLS[0][1] - sum(last) / len(last)))
    assert abs(still_learning([{"curve": LEVELS}]) or 1.0) < LEVEL / 10
    for nothing in ([], [[10, 1.0]], [[10, 2.0], [20, 1.0], [30, 1.0]], curve(lambda x: 1.0)):
        assert still_learning([{"curve": nothing}]) is None
    both = [still_learning([{"curve": each}]) for each in (FALLS, LEVELS)]
    assert still_learning([{"curve": FALLS}, {"curve": LEVELS}]) == pytest.approx(sum(both) / 2)  # type: ignore[arg-type]


def test_a_mechanism_that_is_still_learning_has_no_verdict_and_the_others_have() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(9), [8.0, 8.0]), curve=LEVELS)
    for row in rows:
        if row["backend"] == "longformer":
            row["curve"] = FALLS
    (sentence,) = headline(Findings.of(rows))
    assert re.search(
        r"longformer [\d.]+, no verdict: undertrained, it was still learning: [\d.]+ % of the whole fall of its loss "
        r"came in the last fifth of its steps, above 2%", sentence,
    )  # fmt: skip
    assert re.search(r"bigbird [\d.]+, worse than full", sentence)


def test_if_full_attention_is_still_learning_nothing_is_said() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(9), [8.0, 8.0]), curve=LEVELS)
    for row in rows:
        if row["backend"] == "full":
            row["curve"] = FALLS
    (task,) = tasks(rows)
    assert compared(task) == []
    assert task.obstacles()[0].startswith("undertrained, no verdict: full attention itself was still learning: ")
    assert not differs(headline(Findings.of(rows))[-1])


def test_who_gives_nearly_all_answers_has_no_more_to_learn_than_counts() -> None:
    full = [0.992, 0.991, 0.993]
    assert one([0.6, 0.61, 0.59], full, "mqar", curve=LEVELS).kind is not None
    rows = rows_of({"full": full, "longformer": [0.6, 0.61, 0.59]}, "mqar", curve=LEVELS)
    for row in rows:
        row["curve"] = FALLS if row["backend"] == "full" else LEVELS
    (task,) = tasks(rows)
    assert task.obstacles() == []
    assert len(compared(task)) == 1
    for row in rows:  # a tenth of a point below the margin
        if row["backend"] == "full":
            row["metrics"]["accuracy"] = row["evaluations"]["test"]["accuracy"] = 0.989
    (task,) = tasks(rows)
    assert task.obstacles()[0].startswith("undertrained, no verdict: full attention itself was still learning: ")


NEAR = {"distance": [[4, 1.0, 0.1, 100], [8, 0.96, 0.1, 100], [16, 0.1, 4.0, 800]]}
MISSED = {"distance": [[4, 0.9, 0.1, 100], [8, 0.5, 0.1, 100], [16, 0.1, 4.0, 800]]}


@pytest.mark.parametrize(
    ("attention", "far"),
    [
        ({"name": "longformer", "window": 8}, 8),
        ({"name": "longformer", "window": 8, "dilation": 2}, None),
        ({"name": "transformer_xl", "segment_length": 8, "memory_length": 16}, 16),
        ({"name": "bigbird", "block": 4, "window_blocks": 3}, 4),
        ({"name": "bigbird", "block": 4, "window_blocks": 1}, None),
        ({"name": "reformer", "chunk": 8}, None),
        ({"name": "longformer", "window": "eight"}, None),
        ({"name": "full"}, None),
    ],
)
def test_what_a_mechanism_surely_sees(attention: dict[str, Any], far: int | None) -> None:
    row = {"kind": "quality", "backend": "x", "config": {"attention": attention}, "by_group": MISSED}
    assert surely_seen(row) == far
    expected = {None: None, 4: (0.9, 4), 8: (0.7, 8), 16: (pytest.approx(0.22), 16)}
    assert within_reach([row]) == expected[far]


def test_who_misses_what_stands_within_its_reach_is_undertrained() -> None:
    config = {"attention": {"name": "longformer", "window": 8}}
    full = rows_of({"full": [0.99, 0.985, 0.995, 0.98, 0.99, 0.985, 0.99]}, "mqar")
    low = {"longformer": [0.4, 0.41, 0.39, 0.4, 0.42, 0.4, 0.4]}
    (missed,) = compared(tasks(full + rows_of(low, "mqar", config=config, by_group=MISSED))[0])
    assert missed.words() == (
        "no verdict: undertrained, it reached 70.0 % within the 8 tokens that it surely sees, below 95%"
    )
    (near,) = compared(tasks(full + rows_of(low, "mqar", config=config, by_group=NEAR))[0])
    assert near.kind == "worse", "beyond its window it can know nothing, and that is its result"


def test_text_that_does_not_beat_its_trigrams_is_undertrained_whoever_it_is() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(10), [8.0]), baselines={"order-3 n-gram": 2.4}, curve=LEVELS)
    (found,) = compared(tasks(rows)[0])
    assert re.fullmatch(
        r"no verdict: undertrained, it reached 2\.4\d\d, order-3 n-gram 2\.400", found.words()
    )  # fmt: skip
    for row in rows:
        row["baselines"] = {"order-3 n-gram": 2.0}
    (task,) = tasks(rows)
    assert compared(task) == []
    assert "full attention itself reached" in task.obstacles()[0]


def test_verdicts_are_in_tables_of_the_page_and_beside_it() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(11), [8.0, 0.0]))
    found = tables(Findings.of(rows))
    assert found["text-512-tokens-verdicts"].headers[-1] == "verdict"
    assert [line[0] for line in found["text-512-tokens-verdicts"].cells] == ["bigbird", "longformer"]
    assert not set("−±") & set(latex(found["text-512-tokens-verdicts"]))
    assert '<th scope="col">verdict</th>' in html_of(rows)


@pytest.mark.parametrize(
    ("own", "full", "both", "apart"),
    [
        ({"steps": 100}, {"steps": 300}, {"regime": "steps"}, "steps"),
        ({"steps": 100}, {"steps": 300}, {"regime": "flops"}, None),
        ({"steps": 100}, {"steps": 300}, {"regime": "parameters"}, "steps"),
        ({"model": {"feed_forward": "gelu"}}, {"model": {"feed_forward": {"name": "gelu", "width": 9}}},
         {"regime": "parameters"}, None),
        ({"optimizer": {"lr": 0.1}}, {"optimizer": {"lr": 0.2}}, {}, "optimizer.lr"),
        ({"optimizer": {"lr": 0.1}}, {"optimizer": {"lr": 0.2}},
         {"rates": {"tried": [0.1, 0.2], "chosen": 0.1, "judged_on": "validation"}}, None),
    ],
)  # fmt: skip
def test_what_differs_because_something_else_is_equal_keeps_nobody_from_a_verdict(
    own: dict[str, Any], full: dict[str, Any], both: dict[str, Any], apart: str | None
) -> None:
    scores = drawn_scores(np.random.default_rng(12), [8.0])
    rows = rows_of(scores, **both)
    for row in rows:
        row["config"] = {"attention": {"name": row["backend"]}, **(full if row["backend"] == "full" else own)}
    (task,) = tasks(rows)
    if apart is None:
        assert [each.kind for each in compared(task)] == ["worse"]
    else:
        assert task.obstacles() == [f"no verdict: the runs differ in more than the mechanism ({apart})"]


def test_runs_that_the_set_of_their_result_has_stopped_are_not_compared() -> None:
    scores = drawn_scores(np.random.default_rng(12), [8.0])
    rows = rows_of(scores, stopped="patience: no better")
    assert tasks(rows)[0].obstacles() == [], "validation stopped them, and test judges them"
    for row in rows:
        row["evaluations"] = {"validation": row["metrics"]}
    assert tasks(rows)[0].obstacles() == ["no verdict: runs were stopped by the set that they are judged by"]


def test_runs_that_ended_at_a_figure_are_not_as_good_for_it() -> None:
    """All that reach stop_at end near it, however long they took: so that they were alike was asked for."""
    scores = {
        "full": [0.96 + 1e-4 * seed for seed in range(7)],
        "longformer": [0.96 + 1e-4 * (6 - n) for n in range(7)],
    }
    rows = rows_of(scores, "mqar", **BRIEF)
    assert [each.kind for each in compared(tasks(rows)[0])] == ["as good"]
    rows = rows_of(scores, "mqar", **BRIEF, stopped="stop_at: accuracy reached 0.9600 at step 40")
    assert tasks(rows)[0].obstacles() == [
        "no verdict: runs were ended at a figure (stop_at), at which those that reach it are alike"
    ]
    assert compared(tasks(rows)[0]) == []


def test_runs_that_ended_by_patience_say_after_how_many_steps() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(12), [8.0]), stopped="patience: no better")
    for row in rows:
        row["steps"] = 200 if row["backend"] == "full" else 300 + row["seed"]
    said = "text, 512 tokens: runs ended by their own patience, not after equal steps: full 200, longformer 300 to 306"
    assert f"{said} steps." in html_of(rows)
    assert "patience" not in html_of(rows_of(drawn_scores(np.random.default_rng(12), [8.0])))


def test_the_reference_is_not_the_best_of_several() -> None:
    rows = rows_of({"full": [2.4, 2.41, 2.4], "longformer": [2.3, 2.3, 2.31]})
    rows += [{**row, "config": {"attention": {"name": "full", "sink_logit": True}}, "id": f"{row['id']}-sink",
              "metrics": {"bits_per_byte": 2.2 + 0.001 * row["seed"]}} for row in rows[:3]]  # fmt: skip
    for row in rows[:3]:
        row["config"] = {"attention": {"name": "full", "sink_logit": False}}
    (task,) = tasks(rows)
    assert task.full is not None
    assert task.full.label == "full (sink_logit=false)"
    assert [each.label for each in task.others] == ["full (sink_logit=true)", "longformer"]


def test_one_mechanism_in_another_model_keeps_the_others_from_nothing() -> None:
    rows = rows_of(drawn_scores(np.random.default_rng(13), [8.0, 8.0]))
    for row in rows:
        row["config"] = {"attention": {"name": row["backend"]}, "model": {"depth": 2 + (row["backend"] == "bigbird")}}
    (task,) = tasks(rows)
    assert {each.learnt.backend: each.kind for each in compared(task)} == {"longformer": "worse", "bigbird": None}
    (sentence,) = headline(Findings.of(rows))
    assert "no verdict: its runs differ from those of full in more than the mechanism (model.depth)" in sentence
