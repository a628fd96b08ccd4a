"""Variable tracking: following the statements answers every question, and these stand anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.task import IGNORED, Batch
from attention_zoo.tasks.variable_tracking import VariableTracking


def rows_of(task: VariableTracking, length: int, count: int = 200) -> Batch:
    return next(task.train_batches(count, length, seed=0))


def solve(row: list[int], variables: int) -> tuple[dict[int, int], list[int]]:
    """What to answer at each column that asks, and how many look-ups that took."""
    meaning = {row[at + 1]: row[at + 2] for at, token in enumerate(row) if token == 1}
    answers, looked_up = {}, []
    for at, token in enumerate(row):
        if token == 2:
            found, steps = row[at + 1], 0
            while found < 3 + variables:
                found, steps = meaning[found], steps + 1
            answers[at + 1] = found
            looked_up.append(steps)
    return answers, looked_up


@pytest.mark.parametrize(
    "options", [{}, {"hops": 0, "queries": 4}, {"hops": 3, "chains": 2, "queries": 2}, {"chains": 1}], ids=str
)
@pytest.mark.parametrize("length", [53, 64])
def test_following_the_statements_answers_all(options: dict, length: int) -> None:
    task = VariableTracking(**options)
    batch = rows_of(task, length)
    hops, chains, queries = (
        options.get(name, default) for name, default in (("hops", 1), ("chains", 4), ("queries", 1))
    )
    for row, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        answers, looked_up = solve(row, 64)
        assert answers == {column: target for column, target in enumerate(targets) if target != IGNORED}
        assert looked_up == [hops + 1] * queries
        assert row.count(1) == chains * (hops + 1)
        values = [token for token in row if token >= 67]
        assert len(set(values)) == len(values) == chains
        names = [token for token in row if 3 <= token < 67]
        assert len(set(names)) == chains * (hops + 1)


def test_distance_is_that_of_the_farthest_statement() -> None:
    batch = rows_of(VariableTracking(hops=2, chains=2), 41)
    for row, targets, distance in zip(batch.ids.tolist(), batch.targets.tolist(), batch.groups["distance"].tolist()):
        statement = {row[at + 1]: at + 2 for at, token in enumerate(row) if token == 1}
        found, ends = row[-1], []
        while found < 67:
            ends.append(statement[found])
            found = row[statement[found]]
        assert distance == [-1] * 40 + [40 - min(ends)]
        assert targets[-1] == found


def test_statements_stand_anywhere_in_any_order() -> None:
    batch = rows_of(VariableTracking(hops=2, chains=2), 40, 6000)
    places = (batch.ids == 1).sum(0).numpy()[:36]  # of the 36 columns that a statement may begin at
    inner = places[3:-3]  # at the ends fewer arrangements are possible beside a block
    assert inner.min() > 0.75 * inner.max()
    assert places.min() > 0
    value = (batch.ids >= 67).int().argmax(1)  # the first value's statement is as likely to be any of the six
    order = ((batch.ids == 1) & (torch.arange(40) < value[:, None])).sum(1) - 1
    expected = np.array([5, 4, 3, 2, 1]) / 15  # of the first of two among six
    assert np.bincount(order.numpy(), minlength=5) / 6000 == pytest.approx(expected, abs=0.03)


def test_trivial_rules_are_right_for_one_chain_in_four() -> None:
    task = VariableTracking(test_examples=3000)
    found = task.baselines(64)
    assert found == {"nearest value": pytest.approx(0.25, abs=0.03), "first value": pytest.approx(0.25, abs=0.03)}
    assert task.chance(64) == 1 / 64


def test_splits_never_meet_and_rows_are_a_function_of_their_key() -> None:
    task = VariableTracking(hops=0, chains=1, variables=4, values=4, test_examples=40, test=[30], test_hops=[1])
    sets = task.evaluation_sets(16, 9)
    assert list(sets) == ["validation", "test", "length_30", "hops_1"]
    seen = {name: {tuple(row) for b in sets[name] for row in b.ids.tolist()} for name in ("validation", "test")}
    trained = {tuple(row) for seed in (0, 1) for row in next(task.train_batches(500, 9, seed)).ids.tolist()}
    assert not seen["validation"] & seen["test"]
    assert not trained & (seen["validation"] | seen["test"])
    assert all((batch.ids == 1).sum(1).tolist() == [2] * len(batch.ids) for batch in sets["hops_1"])
    task = VariableTracking()
    one, again, other = (next(task.train_batches(8, 64, seed)).ids for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 5}, "queries must be at most chains, got 5 of 4"),
        ({"variables": 7}, r"variables must be at least chains \* \(hops \+ 1\), 8, got 7"),
        ({"variables": 8, "test_hops": [2]}, "12, got 8"),
        ({"values": 3}, "values must be at least chains, 4, got 3"),
        ({"hops": -1}, "hops must be an integer of at least 0, got -1"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariableTracking(**options)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len must be at least 26, .* for 1 hops, got 25"):
        VariableTracking().check(25)
    with pytest.raises(ValueError, match=r"seq_len must be at least 50, .* for 3 hops, got 40"):
        VariableTracking(test_hops=[3]).check(40)
