"""To shorten the input competes in the table of those that read all of it, and the page says what was kept."""

from __future__ import annotations

from typing import Any

import pytest
from report_page import html_of
from report_rows import LENGTHS, quality, speed, unfinished

from attention_zoo.report import Findings, build_report
from attention_zoo.report import quality as learnt
from attention_zoo.report.beside import pairs
from attention_zoo.report.build import sections
from attention_zoo.report.groups import shortening
from attention_zoo.report.summary import summary
from attention_zoo.report.verdicts import compared

HEAD = {"method": "head", "budget": 512}
CHUNKS = {"method": "chunks", "budget": 256, "chunk": 64}


def trained(
    backend: str, seed: int, how: dict | None = None, digest: str = "whole", share: float = 0.25, **task: Any
) -> dict[str, Any]:
    row = quality(backend, "quote", seed, id=f"{backend}-{seed}-{how}-{digest}-{task}")
    row["metrics"] = {key: value - (0.2 if how else 0.0) for key, value in row["metrics"].items()}
    row["config"] = {"attention": {"name": backend}, "seed": seed,
                     "task": {"_target_": "tasks.Quote", "compress": how, **task}}  # fmt: skip
    row["data"] = {"digest": digest}
    if how:
        row["data"]["compress"] = {**how, "kept_share": share, "documents": 4000, "shortened": 3000}
    return row


def both() -> list[dict[str, Any]]:
    return [trained(backend, seed, how) for backend in ("full", "longformer") for how in (None, HEAD, CHUNKS)
            for seed in (0, 1)]  # fmt: skip


NAMES = ["full", "full (compress=chunks 256 chunk=64)", "full (compress=head 512)",
         "longformer", "longformer (compress=chunks 256 chunk=64)", "longformer (compress=head 512)"]  # fmt: skip


def test_shortened_runs_are_groups_of_the_same_table_and_are_compared() -> None:
    (task,) = learnt.tasks(both())
    assert task.title == "quote, 64 tokens"
    assert [each.label for each in task.learnt] == NAMES
    assert [each.seeds for each in task.learnt] == [2] * 6
    assert task.obstacles() == []
    assert [each.learnt.label for each in compared(task)] == NAMES[1:]
    assert task.full is not None
    assert task.full.label == "full"


def test_who_reads_less_is_named_beside_another_mechanism_that_reads_all() -> None:
    (task,) = learnt.tasks([trained("full", 0), trained("longformer", 0, HEAD)])
    assert [each.label for each in task.learnt] == ["full", "longformer (compress=head 512)"]


def test_the_page_says_what_was_kept() -> None:
    body = html_of(both())
    kept = "25.0\u00a0% of bytes kept, 3,000 of 4,000 documents shortened"
    where = "Text was shortened where a name says so: "
    assert f"{where}chunks 256 chunk=64, {kept}; head 512, {kept}." in body
    assert "Text was shortened" not in html_of([trained("full", 0)])
    alike = html_of([trained(backend, 0, HEAD) for backend in ("full", "longformer")])
    assert "Text was shortened: head 512" in alike
    parts = sections(Findings.of([trained(backend, 0, HEAD) for backend in ("full", "longformer")]))
    assert "compress=" not in parts["learning"] + parts["summary"], "what is the same for all is in no name"
    most = html_of([trained("full", 0, {"method": "extractive", "budget": 9})])
    assert "extractive 9, at most 25.0" in most


def test_tokens_that_were_seen_are_those_of_the_shortened_rows() -> None:
    body = html_of([trained("full", 0, HEAD) | {"tokens_per_second": 100.0, "train_seconds": 7.0}, trained("full", 0)])
    assert "<td>700</td>" in body
    assert f"<td>{300 * 16 * 64:,}</td>" in body


@pytest.mark.parametrize("change", [{"digest": "other"}, {"pairs": 8}])
def test_other_data_or_other_options_stay_another_task(change: dict[str, Any]) -> None:
    one, two = learnt.tasks([trained("full", 0), trained("full", 0, HEAD, **change)])
    assert {"quote (data=whole), 64 tokens", "quote (data=other, compress=head 512), 64 tokens",
            "quote, 64 tokens", "quote (pairs=8, compress=head 512), 64 tokens"} >= {one.title, two.title}  # fmt: skip
    assert [each.label for task in (one, two) for each in task.learnt] == ["full", "full"]
    lost = unfinished(trained("full", 1, HEAD, **change), "failed", "broke") | {"data": None}
    tasks = learnt.tasks([trained("full", 0), trained("full", 0, HEAD, **change), lost])
    assert [len(each.failed) for task in tasks for each in task.learnt if "head" in task.title] == [1]


def test_text_whose_bytes_are_predicted_is_another_task_and_says_what_was_kept() -> None:
    whole, less = quality("full", "text", 0), quality("full", "text", 0, id="less")
    for row, how, data in ((whole, None, {"digest": "a"}), (less, HEAD, {"digest": "b", "kept_share": 0.12})):
        row["config"] = {"attention": {"name": "full"}, "task": {"_target_": "tasks.Text", "compress": how}}
        row["data"] = data
    assert [task.variation for task in learnt.tasks([whole, less])] == ["data=a", "data=b, compress=head 512"]
    assert "Text was shortened: head 512, 12.0" in html_of([whole, less])


def test_the_bar_is_the_best_that_rules_reach_on_what_any_of_them_read() -> None:
    rows = [trained("full", 0), trained("full", 0, HEAD)]
    rows[0]["baselines"], rows[1]["baselines"] = {"bigrams": 0.5, "place": 0.6}, {"bigrams": 0.7, "place": 0.4}
    (task,) = learnt.tasks(rows)
    assert task.bars == {"bigrams": 0.7, "place": 0.6}


def test_costs_at_whole_lengths_are_not_those_of_who_reads_less(tmp_path) -> None:
    rows = [speed("longformer", "auto", n) for n in LENGTHS] + both()
    found = Findings.of(rows)
    assert [(learnt.label, line.label) for learnt, line in pairs(found.tasks[0], found.series)] == [
        ("longformer", "longformer")
    ]
    assert summary(found).names == ["longformer", *(name for name in NAMES if name != "longformer")]
    assert "longformer (compress=head 512)" in build_report(rows, tmp_path / "report.html").read_text()


def test_what_says_nothing_of_shortening_is_whole() -> None:
    row = quality("full", "quote", 0)
    assert shortening(row) == ""
    assert shortening({**row, "config": {"task": "quote"}}) == ""
    assert shortening({**row, "config": {"task": {"compress": "head"}}}) == ""
    (task,) = learnt.tasks([row, trained("full", 1, None) | {"data": None, "config": row["config"]}])
    assert task.shortened() is None
