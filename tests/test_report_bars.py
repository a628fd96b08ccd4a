"""What needs no model stands beside the models: in the table, in what may be compared, in charts by group."""

from typing import Any

import pytest
from report_page import drawn
from report_rows import made_up, quality

from attention_zoo.report import Findings, build_report, markdown_table
from attention_zoo.report.quality import tasks
from attention_zoo.report.summary import headline


def judged(*values: float, **row: Any) -> Any:
    """One task on which full attention and longformer reached two values over two seeds."""
    (metric,) = {"metric", *row} & {"metric"}
    name = row.pop(metric, "accuracy")
    rows = [
        quality(backend, "mqar", seed, metrics={name: value, "loss": 1.0}, evaluations={"test": {name: value}},
                metric=name, **row)
        for backend, value in zip(("full", "longformer"), values) for seed in (0, 1)
    ]  # fmt: skip
    (task,) = tasks(rows)
    return task, rows


def test_baselines_and_chance_stand_in_the_table_of_the_models() -> None:
    _, rows = judged(0.99, 0.5, better="higher", chance=0.125, baselines={"last value": 0.25})
    lines = markdown_table(Findings.of(rows)).splitlines()
    assert any("(last value)" in line and "25.0 %" in line for line in lines)
    assert any("(chance)" in line and "12.5 %" in line for line in lines)


def test_a_baseline_of_two_tasks_is_one_line() -> None:
    rows = [{**row, "chance": 0.5, "baselines": {}} if row["kind"] == "quality" else row for row in made_up()]
    assert markdown_table(Findings.of(rows)).count("(chance)") == 1


@pytest.mark.parametrize(
    ("full", "bar", "better", "metric", "said"),
    [
        (2.5, 2.44, "lower", "bits_per_byte", "reached 2.500, n-gram 2.440"),
        (2.4, 2.44, "lower", "bits_per_byte", None),
        (0.96, 0.97, "higher", "accuracy", "reached 96.0 %, n-gram 97.0 %"),
        (0.96, 0.5, "higher", "accuracy", None),
        (0.90, 0.5, "higher", "exact_match", "reached 90.0 %, below 95%"),
        (0.2, 0.1, "higher", "of_ones_own", None),
    ],
)  # fmt: skip
def test_who_does_not_beat_the_bar_is_undertrained(
    full: float, bar: float, better: str, metric: str, said: str | None
) -> None:
    task, rows = judged(full, full, metric=metric, better=better, baselines={"n-gram": bar})
    found = [line for line in task.obstacles() if "undertrained" in line or "nobody says" in line]
    said = said and f"undertrained, no verdict: full attention itself {said}"
    assert found == ([] if said is None else [said])
    assert task.lower_is_better == (better == "lower")
    assert (said or "undertrained") in " ".join(headline(Findings.of(rows))) or said is None


def test_a_task_is_judged_by_its_own_metric() -> None:
    row = quality("full", "mqar", metrics={"accuracy": 0.9, "exact_match": 0.4, "loss": 1.0}, metric="exact_match")
    assert tasks([row])[0].metric == "exact_match"
    assert tasks([{**row, "metric": "accuracy"}])[0].metric == "accuracy"


def test_groups_of_answers_and_bars_are_drawn() -> None:
    groups = {"distance": [[1, 1.0, 0.1, 50], [4, 0.5, 1.0, 50]]}
    task, rows = judged(0.99, 0.5, better="higher", by_group=groups, chance=0.1)
    data = drawn(rows)
    assert [run["groups"] for run in data["runs"]] == [groups] * 4
    assert data["tasks"][0]["bars"] == {"chance": 0.1}
    assert data["tasks"][0]["obstacles"] == task.obstacles()


def test_further_metrics_have_columns_and_baselines_of_their_own(tmp_path: Any) -> None:
    metrics = {"bits_per_masked_byte": 2.0, "loss": 1.4, "accuracy": 0.6, "order_accuracy": 0.75, "order_loss": 0.5}
    rows = [
        quality("full", "mlm", metrics=metrics, evaluations={"test": metrics}, metric="bits_per_masked_byte",
                better="lower", further_baselines={"order_accuracy": {"bag of bytes": 0.53}})
    ]  # fmt: skip
    (task,) = tasks(rows)
    assert task.further == {"order_accuracy": {"bag of bytes": 0.53}}
    page = build_report(rows, tmp_path / "report.html", title="t").read_text().replace("\xa0", " ")
    assert "order accuracy" in page
    assert "75.0 %" in page
    assert "(bag of bytes)" in page
    assert "53.0 %" in page
