"""Flip-flop: a memory of one bit answers every question, and writes stand anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.flip_flop import WRITE, FlipFlop
from attention_zoo.tasks.task import IGNORED, Batch


def rows_of(task: FlipFlop, length: int, count: int = 300) -> Batch:
    return next(task.train_batches(count, length, seed=0))


def solve(row: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    """What to answer at each column that asks, and how far back its bit was written, by reading from left to right."""
    memory, written, new = -1, -1, False
    answers, distances = {}, {}
    for column in range(0, len(row), 2):
        bit = row[column + 1] if column + 1 < len(row) else None
        if row[column] == 2:
            memory, written, new = bit, column + 1, True
        elif row[column] == 3:
            assert bit in (None, memory), "a read shows what was written"
            if new:
                answers[column], distances[column] = memory, column - written
            new = False
        else:
            assert row[column] == 4
    return answers, distances


@pytest.mark.parametrize("options", [{}, {"p_ignore": 0.5}, {"p_ignore": 0.8, "prefix": False}], ids=str)
@pytest.mark.parametrize("length", [7, 61, 64])
def test_a_memory_of_one_bit_answers_all(options: dict, length: int) -> None:
    batch = rows_of(FlipFlop(**options), length)
    for row, targets, distance in zip(batch.ids.tolist(), batch.targets.tolist(), batch.groups["distance"].tolist()):
        answers, distances = solve(row)
        assert answers
        assert answers == {column: target for column, target in enumerate(targets) if target != IGNORED}
        assert distances == {column: steps for column, steps in enumerate(distance) if steps >= 0}
        assert row[(length - 1) // 2 * 2] == 3, "the last instruction reads"


def test_instructions_are_as_likely_as_they_should_be() -> None:
    kinds = rows_of(FlipFlop(p_ignore=0.8, prefix=False), 64, 4000).ids[:, ::2].numpy()
    assert (kinds[:, 0] == 2).all()
    found = np.bincount(kinds[:, 1:-1].ravel(), minlength=5)[2:] / kinds[:, 1:-1].size
    assert found == pytest.approx([0.1, 0.1, 0.8], abs=0.005)


def test_the_first_write_stands_anywhere() -> None:
    kinds = rows_of(FlipFlop(), 42, 6000).ids[:, ::2]
    first = np.bincount((kinds == 2).int().argmax(1).numpy(), minlength=20)
    assert len(first) == 20
    assert first.min() > 0.75 * first.max()


def test_long_gaps_span_the_row() -> None:
    task = FlipFlop(test=[200], test_p_ignore=[0.1], test_examples=50)
    sets = task.evaluation_sets(50, 100)
    assert list(sets) == ["validation", "test", "p_ignore_0.1", "length_200", "long_gap", "long_gap_200"]
    for name, length in (("long_gap", 100), ("long_gap_200", 200)):
        batch = next(iter(sets[name]))
        assert (batch.groups["distance"].amax(1) > 0.93 * length).all()
        assert (batch.groups["distance"] >= 0).sum(1).tolist() == [1] * 50
    dense = next(iter(sets["p_ignore_0.1"]))
    assert (dense.ids == 4).float().mean() < 0.4
    assert "long_gap" not in FlipFlop(long_gap=0).evaluation_sets(4, 64)


def test_trivial_rules_fail() -> None:
    found = FlipFlop().baselines(128)
    assert found["last bit"] == pytest.approx(0.53, abs=0.04)
    assert found["commonest bit"] == pytest.approx(0.57, abs=0.04)
    assert found["first write"] == pytest.approx(0.87, abs=0.04)
    task = FlipFlop(test_examples=2000)
    batch = next(iter(task.evaluation_sets(2000, 128)["long_gap"]))
    asked = batch.targets != IGNORED
    for name, guess in task.guesses(batch).items():
        accuracy = (guess == batch.targets)[asked].float().mean()
        assert name == "first write" or abs(accuracy - 0.5) < 0.08, name


def test_splits_never_meet_and_rows_are_a_function_of_their_key() -> None:
    task = FlipFlop(p_ignore=0.5, test_examples=200)
    sets = [{tuple(row) for b in part for row in b.ids.tolist()} for part in task.evaluation_sets(64, 12).values()]
    trained = {tuple(row) for seed in (0, 1) for row in next(task.train_batches(500, 12, seed)).ids.tolist()}
    assert not sets[0] & sets[1]
    assert not trained & set.union(*sets)
    one, again, other = (next(task.train_batches(8, 64, seed)).ids for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"flip_flop: seq_len must be at least 7, .* got 6"):
        FlipFlop().check(6)
    with pytest.raises(ValueError, match=r"flip_flop: task.test must be at least 7, .* got 5"):
        FlipFlop(test=[5]).check(64)
    with pytest.raises(ValueError, match="p_ignore must be a probability below 1, got 1"):
        FlipFlop(p_ignore=1)


def test_the_write_of_long_gaps_stands_before_the_question_wherever_it_may_stand() -> None:
    sets = FlipFlop(long_gap=1.0, test_examples=200).evaluation_sets(200, 9)
    (batch,) = sets["long_gap"]
    assert ((batch.ids == WRITE).sum(1) == 1).all()


def test_a_set_without_rows_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="rows of 7 tokens must be enough for every split, got none for test"):
        FlipFlop().evaluation_sets(8, 7)
