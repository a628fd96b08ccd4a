"""Memorisation: one table for all rows, whatever the seed and the split."""

from __future__ import annotations

import numpy as np
import pytest

from attention_zoo.tasks.memorisation import Memorisation
from attention_zoo.tasks.task import IGNORED, Batch


def read(batch: Batch, table: dict[int, int], insert: int) -> None:
    """Add what rows say of the table; they must agree with it."""
    for row, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        for column, target in enumerate(targets):
            asked = column > 0 and row[column] == insert
            assert (target != IGNORED) == asked
            if asked:
                assert table.setdefault(row[column - 1], target) == target


@pytest.mark.parametrize("length", [2, 31, 32])
def test_one_table_answers_every_row_of_every_seed_and_split(length: int) -> None:
    task = Memorisation(keys=10, values=4)
    table: dict[int, int] = {}
    for seed in (0, 1):
        read(next(task.train_batches(200, length, seed)), table, insert=14)
    for batches in task.evaluation_sets(200, length).values():
        read(next(iter(batches)), table, insert=14)
    assert sorted(table) == list(range(10))
    assert sorted(np.bincount(list(table.values()))[10:].tolist()) == [2, 2, 3, 3]
    other = Memorisation(keys=10, values=5)
    assert {key: int(value) for key, value in enumerate(other.table)} != table


def test_keys_are_uniform_and_trivial_rules_fail() -> None:
    task = Memorisation(keys=64, values=64)
    counts = np.bincount(next(task.train_batches(2000, 32, 0)).ids[:, ::2].flatten().numpy())
    assert len(counts) == 64
    assert counts.min() > 0.8 * counts.max()
    found = task.baselines(32)
    assert found["one value"] == pytest.approx(task.chance(32), abs=0.01)
    assert found["commonest value"] == pytest.approx(0.125, abs=0.02)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="memorisation: seq_len must be at least 2, a key and an insert, got 1"):
        Memorisation().check(1)
    with pytest.raises(ValueError, match="keys must be an integer of at least 2"):
        Memorisation(keys=1)
