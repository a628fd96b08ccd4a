"""Runs that differ in more than their seed are never one figure, and what differs is in every name."""

from __future__ import annotations

import csv
import io

import pytest
from report_page import drawn, html_of
from report_rows import ENVIRONMENT, LENGTHS, made_up, quality, speed, unfinished
from rich.console import Console

from attention_zoo.report import Findings, build_report, headline, rich_table, write_csv
from attention_zoo.report import quality as learnt
from attention_zoo.report.beside import pairs
from attention_zoo.report.costs import MEMORY, TIME
from attention_zoo.report.palette import styles
from attention_zoo.report.summary import labels, summary


def trained(backend: str, seed: int, name: str = "", on: str = "text", **config):
    """A run whose config says how it was made; figures differ with it."""
    row = quality(backend, on, seed, id=f"{backend}-{seed}-{name}-{config}")
    shift = len(name) / 10
    row["metrics"] = {key: value + shift for key, value in row["metrics"].items()}
    row["config"] = {"attention": {"name": backend}, "steps": 300, "seed": seed, "output": f"runs{seed}", **config}
    return row


CHANGES = [
    ({"model": {"dim": 16}}, {"model": {"dim": 32}}, "model.dim=16"),
    ({"optimizer": {"_target_": "a.adamw", "lr": 0.1}}, {"optimizer": {"_target_": "a.adamw", "lr": 0.2}},
     "optimizer.lr=0.1"),
    ({"optimizer": {"_target_": "a.adamw"}}, {"optimizer": {"_target_": "a.muon"}}, "optimizer=adamw"),
    ({"steps": 100}, {"steps": 300}, "steps=100"),
    ({"batch": 4}, {"batch": 8}, "batch=4"),
    ({"trainer": {"carry_state": True}}, {"trainer": {"carry_state": False}}, "trainer.carry_state=true"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "said"), CHANGES, ids=[said for *_, said in CHANGES])
def test_whatever_differs_beside_the_seed_is_a_line_of_its_own_and_has_no_verdict(one, two, said):
    rows = [trained("full", s, name, **change) for name, change in (("", one), ("x", two)) for s in (0, 1)]
    (task,) = learnt.tasks(rows)
    assert sorted(len(each.rows) for each in task.learnt) == [2, 2]
    assert f"full ({said})" in [each.label for each in task.learnt]
    key = said.partition("=")[0]
    assert f"no verdict: the runs differ in more than the mechanism ({key})" in task.obstacles()
    (sentence,) = headline(Findings.of(rows))
    assert "no verdict" in sentence
    assert "than full" not in sentence


def test_what_nearly_all_have_in_common_is_said_of_the_others_alone():
    """Of four at least three; of two or three that differ it is said of all."""

    def said(*depths):
        names = ("bigbird", "full", "longformer", "reformer")
        rows = [trained(name, 0, model={"depth": depth}) for name, depth in zip(names, depths)]
        (task,) = learnt.tasks(rows)
        (full,) = (each for each in task.learnt if each.backend == "full")
        unlike = [each.backend for each in task.learnt if each.group.shared != full.group.shared]
        assert [each.backend for each in task.others if task.apart(each) == ["model.depth"]] == unlike
        return sorted(each.label for each in task.learnt)

    assert said(2, 2, 2, 4) == ["bigbird", "full", "longformer", "reformer (model.depth=4)"]
    assert said(2, 2, 4) == ["bigbird (model.depth=2)", "full (model.depth=2)", "longformer (model.depth=4)"]
    assert said(2, 2, 4, 4)[0] == "bigbird (model.depth=2)"


def test_options_of_the_task_and_other_data_make_another_task():
    def one(pairs, digest):
        row = trained("full", 0, str(pairs) + digest, "mqar", task={"_target_": "tasks.Mqar", "pairs": pairs})
        return row | {"data": {"digest": digest}}

    found = learnt.tasks([one(4, "a"), one(8, "a"), one(8, "b")])
    assert [task.title for task in found] == [
        "mqar (pairs=4, data=a), 64 tokens", "mqar (pairs=8, data=a), 64 tokens", "mqar (pairs=8, data=b), 64 tokens",
    ]  # fmt: skip
    lost = unfinished(one(4, "a"), "failed", "no data") | {"data": None, "id": "lost"}
    (first, _) = learnt.tasks([one(4, "a"), one(8, "a"), lost])
    assert [len(each.failed) for each in first.learnt] == [1], "it goes with the task that it was meant for"


def test_what_changes_no_figure_sets_nothing_apart():
    rows = [trained("full", s, progress="none", force=bool(s), tracker={"name": s}, retry=None) for s in (0, 1)]
    (task,) = learnt.tasks(rows)
    assert [(each.label, each.seeds) for each in task.learnt] == [("full", 2)]


def windows():
    sweep = [{"name": "longformer", "window": window} for window in (32, 64, 128)]
    return [trained("longformer", s, attention=attention) for attention in sweep for s in (0, 1)]


def test_a_sweep_over_an_option_is_told_apart_everywhere(tmp_path):
    rows = [*windows(), trained("full", 0), trained("full", 1)]
    names = [f"longformer (window={window})" for window in (128, 32, 64)]
    found = Findings.of(rows)
    assert [each.label for each in found.tasks[0].learnt] == ["full", *names]
    assert "differ in more" not in headline(found)[0], "options of the mechanism are what one compares"
    assert summary(found).names == ["full", *names]
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(rich_table(found))
    assert console.export_text().count("(window=") == 3
    data = drawn(rows)
    assert {run["label"] for run in data["runs"] if "curve" in run} == {"full", *names}
    assert len({tuple(style) for style in data["styles"].values()}) == 4
    with open(write_csv(rows, tmp_path / "rows.csv"), newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)] == [
            *(name for window in (32, 64, 128) for name in [f"longformer (window={window})"] * 2), "full", "full",
        ]  # fmt: skip


def test_a_lost_run_of_a_sweep_is_named_by_what_it_was(tmp_path):
    rows = [
        *windows(),
        unfinished(trained("longformer", 2, attention={"name": "longformer", "window": 32}), "lost", ""),
    ]
    text = build_report(rows, tmp_path / "report.html").read_text()
    assert "longformer (window=32), trained on text, seed 2" in text
    assert "lost: killed from outside, runs again by itself" in text


def test_results_of_other_code_are_not_mixed_with_those_of_this():
    environment = {**ENVIRONMENT, "source": "0123456789abcdef"}
    old = [trained("full", s) | {"environment": environment, "id": f"old{s}"} for s in (0, 1)]
    (task,) = learnt.tasks(Findings.of([*old, trained("full", 2)]).rows)
    assert sorted(each.seeds for each in task.learnt) == [1, 2]
    assert any("code=01234567" in each.label for each in task.learnt)
    again = Findings.of([*old, trained("full", 0), trained("full", 1)])
    assert again.rows.replaced == 2
    assert [each.label for each in again.tasks[0].learnt] == ["full"]


def test_two_files_stand_side_by_side_and_compare_within_themselves():
    rows = []
    for file, factor in (("laptop", 1.0), ("server", 0.1)):
        for backend, kernel in (("full", "sdpa"), ("longformer", "auto")):
            for n in LENGTHS:
                row = speed(backend, kernel, n)
                rows.append(row | {"from": file, "seconds": factor * row["seconds"], "id": f"{row['id']}-{file}"})
        rows.append(trained("full", 0, file) | {"from": file, "id": f"q-{file}"})
    found = Findings.of(rows)
    assert [each.label for each in found.series] == [
        "full (fused; laptop)", "full (fused; server)", "longformer (laptop)", "longformer (server)",
    ]  # fmt: skip
    assert [each.values(TIME)[256] for each in found.series[:2]] == pytest.approx([
        speed("full", "sdpa", 256)["seconds"], 0.1 * speed("full", "sdpa", 256)["seconds"]
    ])  # fmt: skip
    crossings = [found.cheaper_from(each, "sdpa", TIME) for each in found.series[2:]]
    assert crossings[0] == crossings[1], "each beside the baseline of its own file"
    said = headline(found)
    assert sum(sentence.startswith("laptop: ") for sentence in said) == 3
    assert not any("laptop" in sentence and "server" in sentence for sentence in said[:-1])
    assert "full (laptop)" in said[-1]
    assert "than full" not in said[-1]
    data = drawn(found.rows)
    assert len({tuple(data["styles"][each.label]) for each in found.series}) == 4


def test_runs_of_different_lengths_show_the_range():
    rows = [quality("full", "text", 0, steps=100, train_seconds=10.0), quality("full", "text", 1, steps=300)]
    body = html_of(rows)
    for said in ("<td>100 to 300</td>", "<td>10.0\u00a0s to 45.0\u00a0s</td>", "<td>819,200 to 2,457,600</td>"):
        assert said in body


def test_the_set_that_a_figure_is_of_is_named_everywhere():
    rows = [trained(backend, 0) for backend in ("full", "longformer")]
    for row in rows:
        score = row["metrics"]
        row["evaluations"] = {"validation": score, "held_out": {**score, "bits_per_byte": 5.0}}
    found = Findings.of(rows)
    assert summary(found).groups[0] == ("What it learnt", ["text: bits per byte, validation"])
    assert "bits per byte on the validation set: " in headline(found)[0]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(rich_table(found))
    assert "validation" in console.export_text()
    body = html_of(rows)
    assert drawn(rows)["tasks"][0]["judged"] == "bits per byte on the validation set"
    assert "held-out text" not in body
    assert "bits per byte: held out" in body


def test_memory_by_resident_set_is_drawn_and_marked():
    rows = [speed("longformer", "auto", n) for n in LENGTHS[:2]]
    rows.append(speed("longformer", "auto", 65536, peak_bytes=None, resident_bytes=2**31, peak_method="none"))
    rows.append(unfinished(speed("longformer", "auto", 16384), "oom_predicted", "") | {"predicted_bytes": 2**34})
    (series,) = Findings.of(rows).series
    assert series.values(MEMORY).keys() == {256, 1024}
    assert [series.said(MEMORY, length) for length in (16384, 65536)] == [
        "≈ 16.0 GiB (predicted out of memory, not run)", "2.00 GiB*",
    ]  # fmt: skip
    runs = drawn(rows)["runs"]
    assert runs[2]["n"]["resident_bytes"] == 2**31
    assert "peak_bytes" not in runs[2]["n"]
    assert (runs[3]["n"]["predicted_bytes"], runs[3]["why"]) == (2**34, "predicted out of memory, not run")
    assert "by the resident set of the process" in html_of(rows)
    found = Findings.of([rows[2]])
    assert summary(found).cells[0].count("2.00 GiB*") == 2
    assert not any("peaks at" in sentence for sentence in headline(found)), "it is compared with no peak"
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(rich_table(found))
    assert "resident set" in console.export_text()


def test_quality_stands_beside_the_cost_of_its_own_options():
    rows = [speed("longformer", "auto", n) for n in LENGTHS]
    for n in LENGTHS:
        rows.append(speed("longformer", "auto", n, id=f"w-{n}", config={"options": {"window": 32}}))
    found = Findings.of([*rows, *windows()])
    paired = pairs(found.tasks[0], found.series)
    assert [(learnt.label, line.label) for learnt, line in paired] == [("longformer (window=32)",) * 2]
    found = Findings.of(
        [*rows[: len(LENGTHS)], *(row for row in windows() if row["config"]["attention"]["window"] == 32)]
    )
    assert found.tasks[0].others
    assert pairs(found.tasks[0], found.series) == [], "costs of the defaults are not those of a window of 32"


def test_no_two_lines_of_a_report_look_alike():
    many = styles({f"longformer (window={n})": "longformer" for n in range(30)})
    assert len(set(many.values())) == 30
    assert len({style.color for style in many.values()}) == 1
    assert len(labels(Findings.of(made_up(2)).rows)) == len(made_up(2))
