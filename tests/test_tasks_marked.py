"""Marked pairs: a solver that reads rows only, places without preference, and nothing for those who count symbols."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.marked import MARK, PAD, Marked

TASK = Marked(symbols=4, shortest=9)


def rows(count: int = 4000, length: int = 23, task: Marked = TASK):
    return task.draw(np.random.default_rng(0), count, length)


def test_a_reader_of_the_rules_answers_every_row() -> None:
    batch = rows()
    assert batch.tokens is not None
    for ids, valid, answer, gap in zip(batch.ids, batch.tokens.valid, batch.targets, batch.groups["distance"]):
        row = ids[valid].tolist()
        assert row == ids[: len(row)].tolist(), "padding stands on the right"
        assert PAD not in row
        first, second = [place for place, token in enumerate(row) if token == MARK]
        assert int(row[first + 1] == row[second + 1]) == answer
        assert gap == second - first
    lengths = batch.tokens.valid.sum(1)
    assert np.bincount(lengths)[9:].min() > 200, "every length from the shortest on"
    assert len(torch.unique(lengths)) == 15


def test_marks_stand_anywhere_alike_whatever_the_answer() -> None:
    batch = rows(20000, 12, Marked(symbols=4, shortest=12))
    for answer in (0, 1):
        ids = batch.ids[batch.targets == answer]
        pairs = [tuple(np.flatnonzero(row == MARK)) for row in ids.numpy()]
        _, counts = np.unique(pairs, axis=0, return_counts=True)
        assert len(counts) == 45, "two of ten symbols"
        assert counts.max() / counts.min() < 1.6


def test_counting_symbols_says_nothing() -> None:
    batch = rows(20000, 12, Marked(symbols=4, shortest=12))
    assert abs(float(batch.targets.double().mean()) - 0.5) < 0.015
    bags = torch.stack([(batch.ids == symbol).sum(1) for symbol in range(2, 6)], 1).sort(1).values
    keys = (bags * torch.tensor([1, 16, 256, 4096])).sum(1)
    for key in keys.unique():
        answers = batch.targets[keys == key].double()
        assert abs(float(answers.mean()) - 0.5) < 3.5 * 0.5 / len(answers) ** 0.5


def test_trivial_rules_are_at_chance() -> None:
    found = Marked(symbols=4, shortest=9, test_examples=3000).baselines(23)
    assert set(found) == {"repeated", "most", "near"}
    assert all(abs(value - 0.5) < 0.035 for value in found.values())
    assert TASK.chance(23) == 0.5


def test_rows_follow_from_the_key_and_splits_never_meet() -> None:
    one, two = next(TASK.train_batches(64, 17, 0)), next(TASK.train_batches(64, 17, 0))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.ids, next(TASK.train_batches(64, 17, 1)).ids)
    sets = TASK.evaluation_sets(50, 17)
    seen = {name: {tuple(row) for batch in part for row in batch.ids.tolist()} for name, part in sets.items()}
    seen["train"] = {tuple(row) for seed in range(4) for row in next(TASK.train_batches(500, 17, seed)).ids.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"marked: seq_len must be at least 9, task.shortest, got 8"):
        TASK.check(8)
    with pytest.raises(ValueError, match=r"shortest must be at least symbols \+ 3, 11, got 9"):
        Marked(symbols=8, shortest=9)


def test_both_answers_are_as_likely_in_the_shortest_rows_of_two_symbols() -> None:
    batch = Marked(symbols=2, shortest=5).draw(np.random.default_rng(0), 8000, 5)
    assert float(batch.targets.double().mean()) == pytest.approx(0.5, abs=0.03)
