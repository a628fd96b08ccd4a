"""Copying: a word is found again by rules that know nothing of the generator, and it stands anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.copying import Copying
from attention_zoo.tasks.task import IGNORED, Batch

VARIANTS: list[dict] = [
    {},
    {"gap": 7, "prefix": 5},
    {"gap": 3, "reverse": True},
    {"times": 2, "start": False},
    {"times": 2, "reverse": True, "gap": 2, "feed": "blank"},
    {"tokens": 5, "gap": 9, "feed": "marker"},
    {"tokens": 5, "selective": True, "feed": "blank"},
    {"tokens": 5, "selective": True, "feed": "marker"},
    {"tokens": 5, "selective": True, "times": 2, "reverse": True},
]


def rows_of(task: Copying, length: int, count: int = 300) -> Batch:
    return next(task.train_batches(count, length, seed=0))


def solve(row: list[int], task: Copying, tokens: int) -> dict[int, int]:
    """What to answer at each column: the first `tokens` symbols of the row, from its question onwards."""
    word = [token for token in row if token > 1][:tokens]
    symbols = [column for column, token in enumerate(row) if token > 1]
    question = row.index(0, symbols[tokens - 1]) + (task.feed == "blank")
    answers = (word[::-1] if task.reverse else word) * task.times
    return dict(enumerate(answers, start=question))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [41, 64])
def test_a_solver_that_reads_the_row_alone_answers_all_of_it(options: dict, length: int) -> None:
    task = Copying(vocab=12, **options)
    batch = rows_of(task, length)
    tokens = task.word_length(length)
    for row, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        asked = {column: target for column, target in enumerate(targets) if target != IGNORED}
        assert solve(row, task, tokens) == asked
        if task.feed != "word":
            assert set(row[min(asked) : max(asked) + 1]) <= {0, 1}, "answers are not shown"


def test_published_rows_are_what_they_should_be() -> None:
    row = rows_of(Copying(vocab=128), 64).ids[0].tolist()  # 0w0w
    assert (row[0], row[32]) == (0, 0)
    assert row[1:32] == row[33:]
    row = rows_of(Copying(vocab=12, tokens=24, start=False, times=2), 72).ids[0].tolist()  # X # X X, the last unread
    assert row[:24] == row[25:49] == [*row[49:], row[23]]
    batch = rows_of(Copying(vocab=16, tokens=16, selective=True, feed="marker"), 4096 + 32, 20)
    assert ((batch.ids == 0).sum(1) == 16).all()
    assert (batch.ids == 1).sum(1).tolist() == [4096] * 20
    assert (batch.targets[:, -16:] != IGNORED).all()


@pytest.mark.parametrize("options", VARIANTS[1:], ids=str)
def test_distance_leads_from_the_question_to_its_evidence(options: dict) -> None:
    batch = rows_of(Copying(vocab=12, **options), 45)
    row, column = torch.nonzero(batch.targets != IGNORED, as_tuple=True)
    distance = batch.groups["distance"][row, column]
    assert (batch.ids[row, column - distance] == batch.targets[row, column]).all()
    assert ((batch.groups["distance"] >= 0) == (batch.targets != IGNORED)).all()


def test_words_stand_anywhere() -> None:
    def even(counts: np.ndarray) -> bool:
        return counts.min() > 0.8 * counts.max()

    task = Copying(vocab=12, tokens=6, gap=7, prefix=9)
    batch = rows_of(task, 40, 6000)
    first = (batch.ids == 0).int().argmax(1).numpy()
    distance = batch.groups["distance"].amax(1).numpy()
    assert even(np.bincount(first, minlength=10)[:10])
    assert even(np.bincount(distance - 6, minlength=8)[:8])
    assert abs(np.corrcoef(first, distance)[0, 1]) < 0.05
    batch = rows_of(Copying(vocab=12, tokens=6, selective=True, feed="blank"), 40, 6000)
    assert even((batch.ids > 1).sum(0).numpy()[:33])


def test_trivial_rules_fail() -> None:
    task = Copying()
    found = task.baselines(64)
    assert found["one symbol"] == pytest.approx(task.chance(64), abs=0.005)
    assert found["commonest symbol"] == pytest.approx(0.1, abs=0.03)
    task = Copying(vocab=16, tokens=16, selective=True, feed="blank", test_examples=500)
    assert task.baselines(128)["commonest symbol"] == pytest.approx(0.21, abs=0.03)
    assert task.chance(128) == 1 / 14


def test_splits_never_meet_and_rows_are_a_function_of_their_key() -> None:
    task = Copying(vocab=6, tokens=4, gap=2, test=[30])
    sets = {
        name: {tuple(row) for b in part for row in b.ids.tolist()}
        for name, part in task.evaluation_sets(99, 14).items()
    }
    trained = {tuple(row) for seed in (0, 1) for row in next(task.train_batches(500, 14, seed)).ids.tolist()}
    assert list(sets) == ["validation", "test", "length_30"]
    assert not sets["validation"] & sets["test"]
    assert not trained & (sets["validation"] | sets["test"])
    again, other = (next(task.train_batches(8, 14, seed)).ids for seed in (0, 1))
    assert torch.equal(again, next(task.train_batches(8, 14, 0)).ids)
    assert not torch.equal(again, other)


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        ({"tokens": 8}, 16, "copy: seq_len must be at least 17, the word, .* got 16"),
        ({"gap": 9, "prefix": 9}, 20, "seq_len must be at least 21, .* got 20"),
        ({"tokens": 8, "selective": True, "feed": "blank"}, 16, "seq_len must be at least 17, .* got 16"),
        ({"test": [2]}, 64, "task.test must be at least 3, .* got 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused(options: dict, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Copying(**options).check(seq_len)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed": "all"}, "feed must be one of word, blank, marker, got 'all'"),
        ({"gap": -1}, "gap must be an integer of at least 0, got -1"),
        ({"selective": True}, "selective places given tokens anywhere: it needs tokens"),
        ({"selective": True, "tokens": 4, "gap": 2}, "takes neither gap nor prefix, got tokens=4, gap=2"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Copying(**options)
