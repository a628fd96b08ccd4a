"""Induction heads: the answer is found by looking at the row alone, and stands anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.induction import Induction
from attention_zoo.tasks.task import IGNORED


@pytest.mark.parametrize("length", [3, 17, 64])
def test_a_solver_that_reads_the_row_alone_answers_all_of_it(length: int) -> None:
    batch = next(Induction().train_batches(300, length, seed=0))
    for row, targets, distance in zip(batch.ids.tolist(), batch.targets.tolist(), batch.groups["distance"].tolist()):
        assert [column for column, token in enumerate(row) if token == 0] == [row.index(0), length - 1]
        assert targets == [IGNORED] * (length - 1) + [row[row.index(0) + 1]]
        assert distance == [-1] * (length - 1) + [length - 1 - (row.index(0) + 1)]


def test_the_special_token_stands_anywhere_and_answers_are_uniform() -> None:
    batch = next(Induction().train_batches(9000, 14, seed=0))
    first = np.bincount((batch.ids == 0).int().argmax(1).numpy())
    assert len(first) == 12
    assert first.min() > 0.8 * first.max()
    answers = torch.bincount(batch.targets[:, -1])[1:].numpy()
    assert len(answers) == 15
    assert answers.min() > 0.8 * answers.max()


def test_trivial_rules_fail_and_further_lengths_are_tested() -> None:
    task = Induction(test=[32, 96], test_examples=2000)
    found = task.baselines(64)
    assert found["one id"] == pytest.approx(task.chance(64), abs=0.02)
    assert found["token before"] == pytest.approx(task.chance(64) + 1 / 62, abs=0.02)
    assert found["commonest id"] == pytest.approx(0.13, abs=0.03)
    sets = task.evaluation_sets(50, 64)
    assert list(sets) == ["validation", "test", "length_32", "length_96"]
    assert next(iter(sets["length_96"])).ids.shape == (50, 96)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"induction: task.test must be at least 3, .* got 2"):
        Induction(test=[2]).check(64)
    with pytest.raises(ValueError, match="vocab must be an integer of at least 3"):
        Induction(vocab=2)
