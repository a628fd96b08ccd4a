"""Effective lengths from rows: by the rule of its own base, and by a fixed level."""

from pathlib import Path
from typing import Any

import pytest
from report_page import page_of, text_of
from report_rows import quality

from attention_zoo.report import Findings
from attention_zoo.report.extract import trainings_table
from attention_zoo.report.lengths import (
    RULER,
    Effective,
    by_length,
    effective_length,
    lengths_of,
    threshold_length,
    trained_length,
    words,
)
from attention_zoo.report.lengths import of as effective
from attention_zoo.report.quality import tasks
from attention_zoo.report.summary import summary


def loop(accuracy: dict[int, float], trained: int, least: float) -> str:
    """The definition, length by length: the longest at which it and all shorter ones hold."""
    holding = [n for n in accuracy if all(accuracy[m] >= least for m in accuracy if m <= n)]
    if trained not in holding:
        return "–"
    return f"> {max(holding):,}" if len(holding) == len(accuracy) else f"{max(holding):,}"


@pytest.mark.parametrize(
    "accuracy",
    [
        {64: 1.0, 128: 0.9, 256: 0.5},
        {64: 0.9, 128: 0.2, 256: 0.9},       # an island is no reach
        {64: 0.9, 128: 0.88, 256: 0.86},
        {64: 0.5, 128: 0.43, 256: 0.42},     # 85 % of 0.5 is 0.425
        {32: 0.1, 64: 0.9, 128: 0.9},        # a shorter one does not hold
        {32: 0.95, 64: 0.9, 1031: 0.85},
    ],
)  # fmt: skip
def test_both_rules_are_their_definition(accuracy: dict[int, float]) -> None:
    assert words(effective_length(accuracy, 64)) == loop(accuracy, 64, 0.85 * accuracy[64])
    for level in (0.85, RULER, 0.4):
        assert words(threshold_length(accuracy, 64, level=level)) == loop(accuracy, 64, level)


def test_what_has_no_effective_length() -> None:
    assert threshold_length({64: 0.8, 128: 0.9}, 64) is None, "the base itself is below"
    assert effective_length({64: 0.25, 128: 0.25}, 64, floor=0.25) is None, "as good as a trivial rule"
    assert effective_length({64: 0.9}, 64) is None, "no other length was tested"
    assert effective_length({128: 0.9, 256: 0.9}, 64) is None, "the trained length was not tested"
    assert effective_length({64: 0.26, 128: 0.25}, 64, floor=0.25) == Effective(128, False)
    for wrong in (0.0, 1.2, -1.0, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1, got"):
            effective_length({64: 0.9}, 64, share=wrong)
        with pytest.raises(ValueError, match="level must be above 0 and at most 1, got"):
            threshold_length({64: 0.9}, 64, level=wrong)


def scored(at: dict[str, tuple[int, float]], backend: str = "full", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A run with sets by name: tokens of their rows, and accuracy."""
    by_set = {name: {"seq_len": n, "by_group": {}, "loss_by_position": []} for name, (n, _) in at.items()}
    scores = {name: {"accuracy": value} for name, (_, value) in at.items()}
    main = scores["test"]
    return quality(backend, "mqar", seed, evaluations=scores, by_set=by_set, metrics={**main, "loss": 1.0},
                   metric="accuracy", better="higher", seq_len=at["test"][0], **changes)  # fmt: skip


SETS = {
    "validation": (64, 0.2), "test": (64, 0.96), "length_64_pairs_8": (64, 0.1), "test@longer": (128, 0.90),
    "length_128": (128, 0.88), "test@rounds": (256, 1.0), "held_out": (512, 1.0), "length_256": (256, 0.3),
}  # fmt: skip


def test_sets_of_the_same_weights_count_and_the_lowest_of_a_length() -> None:
    asked = {"longer": {"seq_len": 128}, "rounds": {"seq_len": 256, "attention": {"rounds": 8}}}
    row = scored(SETS, config={"attention": {"name": "full"}, "evaluate_at": asked})
    assert by_length(row, "accuracy") == {64: 0.96, 128: 0.88, 256: 0.3}
    assert trained_length([row]) == 64


def test_names_tell_the_length_where_older_rows_do_not() -> None:
    row = scored({"test": (64, 0.9), "length_128_pairs_4": (128, 0.8), "longer": (256, 0.7)})
    del row["by_set"]
    assert lengths_of(row) == {"test": 64, "length_128_pairs_4": 128}
    assert by_length(row, "accuracy") == {64: 0.9, 128: 0.8}


def test_table_and_summary_show_the_mean_over_seeds(tmp_path: Path) -> None:
    rows = [
        scored({"test": (64, 0.99), "length_128": (128, a), "length_256": (256, b)}, backend, seed)
        for backend, seed, a, b in (
            ("full", 0, 0.99, 0.97), ("full", 1, 0.99, 0.97),
            ("longformer", 0, 0.9, 0.4), ("longformer", 1, 0.75, 0.4),  # 82.5 % on the mean: 83 % of its own
            ("bigbird", 0, 0.9, 0.4), ("bigbird", 1, 0.86, 0.4),
        )
    ]  # fmt: skip
    (task,) = tasks(rows)
    assert {each.label: [words(one) for one in effective(each, task) or ()] for each in task.learnt} == {
        "full": ["> 256", "> 256"], "longformer": ["64", "64"], "bigbird": ["128", "128"],
    }  # fmt: skip
    table = trainings_table(task)
    place = table.headers.index("effective length (85% of its own)")
    assert [line[place : place + 2] for line in table.cells] == [["> 256"] * 2, ["128"] * 2, ["64"] * 2]
    assert "effective length" in " ".join(table.notes)
    whole = summary(Findings.of(rows))
    assert dict(whole.groups)["Effective length"] == ["mqar: 85% of its own", "mqar: 85%"]
    assert "effective length (85% of its own)" in text_of(page_of(rows, tmp_path))


def test_text_and_one_length_have_none() -> None:
    for rows in ([quality("full", "text")], [scored({"test": (64, 0.9), "validation": (64, 0.9)})]):
        (task,) = tasks(rows)
        assert effective(task.learnt[0], task) is None
        assert not any("effective" in header for header in trainings_table(task).headers)


def test_costs_stand_beside_what_was_learnt() -> None:
    given = {"state_bytes": 4096, "flops_per_token": 1.5e6}
    rows = [quality("full", "mqar", given=given, evaluation_tokens_per_second=91_000.0, peak_bytes=None)]
    table = trainings_table(tasks(rows)[0])
    found = dict(zip(table.headers, table.cells[0]))
    assert [found[name] for name in ("parameters", "FLOPs a token", "tokens/s in training", "tokens/s in inference",
                                     "peak memory in training", "state")] == [
        "812 k", "1.50 M", "54.0 k", "91.0 k", "–", "4.00 KiB",
    ]  # fmt: skip
    assert "second step" not in " ".join(table.notes)
    (row,) = rows
    table = trainings_table(tasks([{**row, "peak_bytes": 3 * 2**20}])[0])
    assert dict(zip(table.headers, table.cells[0]))["peak memory in training"] == "3.00 MiB"
    assert "second step" in " ".join(table.notes)
