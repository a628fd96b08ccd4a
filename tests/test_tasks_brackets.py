"""Brackets: a stack reads every row, sequences are uniform, and the nearest colour is the wrong one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks import IGNORED
from attention_zoo.tasks.brackets import Brackets

TASK = Brackets(colours=3, depth=3, shortest=12, test_examples=300)


def test_a_stack_answers_every_plain_bracket() -> None:
    batch = TASK.draw(np.random.default_rng(0), 400, 37)
    deepest, lengths, scored = 0, set(), 0
    for ids, valid, targets, distance in zip(
        batch.ids.tolist(), batch.tokens.valid, batch.targets.tolist(), batch.groups["distance"].tolist()
    ):
        lengths.add(int(valid.sum()))
        assert [id != 0 for id in ids] == valid.tolist()
        stack, found, gaps, shown = [], [IGNORED] * 37, [-1] * 37, [i for i, id in enumerate(ids) if id > 1]
        for count, place in enumerate(shown):
            id = ids[place]
            opens = id == 2 or 4 <= id < 7
            if opens:
                stack.append((count, place))
                deepest = max(deepest, len(stack))
                continue
            number, partner = stack.pop()
            ends = {partner: ids[partner], place: id}
            plain = [end for end, what in ends.items() if what in (2, 3)]
            assert len(plain) == 1, "one end of each pair is plain"
            (other,) = set(ends) - set(plain)
            if count - number > 1:
                found[plain[0]], gaps[plain[0]] = (ids[other] - 4) % 3, place - partner
                scored += 1
        assert not stack
        assert found == targets
        assert gaps == distance
    assert deepest == 3
    assert lengths == set(range(12, 38))
    assert scored > 1000


def test_all_nested_sequences_are_as_likely() -> None:
    task = Brackets(colours=2, depth=2, fillers=0, shortest=8)
    batch = task.draw(np.random.default_rng(0), 8000, 8)
    opens = (batch.ids == 2) | ((batch.ids >= 4) & (batch.ids < 6))
    _, counts = np.unique(opens.numpy(), axis=0, return_counts=True)
    assert len(counts) == 8, "of 14 Dyck words of 8 brackets, those at most 2 deep"
    assert counts.max() / counts.min() < 1.2


def test_questions_stand_anywhere() -> None:
    batch = Brackets(shortest=64).draw(np.random.default_rng(0), 4000, 64)
    share = (batch.targets != IGNORED).double().mean(0)[6:-6]
    assert float(share.max() / share.min()) < 1.6
    side = [float((batch.targets[batch.ids == id] != IGNORED).double().mean()) for id in (2, 3)]
    assert abs(side[0] - side[1]) < 0.03, "opening and closing ends alike"


def test_trivial_rules_fail() -> None:
    task = Brackets(test_examples=1000)
    found = task.baselines(64)
    assert set(found) == {"nearest", "inward", "commonest"}
    assert found["nearest"] < 0.35
    assert found["commonest"] < 0.4
    assert found["inward"] < 0.5
    assert task.chance(64) == 0.25


def test_rows_follow_from_the_key_and_splits_never_meet() -> None:
    one, two = next(TASK.train_batches(32, 31, 0)), next(TASK.train_batches(32, 31, 0))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.ids, next(TASK.train_batches(32, 31, 1)).ids)
    sets = TASK.evaluation_sets(100, 31)
    seen = {name: {tuple(row) for batch in part for row in batch.ids.tolist()} for name, part in sets.items()}
    seen["train"] = {tuple(row) for seed in range(3) for row in next(TASK.train_batches(300, 31, seed)).ids.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"brackets: seq_len must be at least 12, task.shortest, got 11"):
        TASK.check(11)
    with pytest.raises(ValueError, match=r"shortest must be an integer .*4, got 3"):
        Brackets(shortest=3)
