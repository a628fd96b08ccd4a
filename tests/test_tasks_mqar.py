"""MQAR: the rows obey the rules, the draws obey the published law, and every row is a function of seed and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks import IGNORED, Mqar
from attention_zoo.tasks.mqar import draw

PAIRS, LENGTH, VOCAB = 4, 32, 24


def rows(fillers: str = "distinct", count: int = 300, **changed):
    options = {"length": LENGTH, "pairs": PAIRS, "vocab": VOCAB, "power": 0.01, **changed}
    return draw(np.random.default_rng(0), count=count, fillers=fillers, **options)


def test_each_key_is_asked_once_and_its_value_is_the_answer() -> None:
    ids, targets = rows()
    context = 2 * PAIRS
    for row, answer in zip(ids, targets):
        keys, values = row[0:context:2], row[1:context:2]
        assert len(set(keys)) == PAIRS
        assert len(set(values)) == PAIRS
        assert keys.min() >= 1
        assert keys.max() < VOCAB // 2 <= values.min()
        asked = np.flatnonzero(answer != IGNORED)
        assert sorted(row[asked]) == sorted(keys)
        assert (asked >= context).all()
        assert (asked % 2 == 0).all()
        assert [dict(zip(keys, values))[key] for key in row[asked]] == answer[asked].tolist()


def test_fillers_never_collide_with_keys_unless_asked_for_as_published() -> None:
    def collisions(fillers: str) -> int:
        ids, targets = rows(fillers)
        filler = targets == IGNORED
        filler[:, : 2 * PAIRS] = False
        return sum(np.isin(row[free], row[0 : 2 * PAIRS : 2]).sum() for row, free in zip(ids, filler))

    assert collisions("distinct") == 0
    assert collisions("any") > 100
    ids, targets = rows("zero")
    assert (ids[:, 2 * PAIRS :][targets[:, 2 * PAIRS :] == IGNORED] == 0).all()


def test_distinct_fillers_are_uniform_over_all_other_ids() -> None:
    ids, targets = rows(count=4000)
    free = targets[:, 2 * PAIRS :] == IGNORED
    found = np.bincount(ids[:, 2 * PAIRS :][free], minlength=VOCAB) / free.sum()
    other = 1 / (VOCAB - PAIRS)  # ids that are never keys: 0 and the values
    assert np.abs(found[[0, *range(VOCAB // 2, VOCAB)]] - other).max() < 0.003
    keyable = (1 - PAIRS / (VOCAB // 2 - 1)) * other  # each lower id is a key of some rows, and then no filler there
    assert np.abs(found[1 : VOCAB // 2] - keyable).max() < 0.003


def test_query_slots_follow_the_power_law_drawn_one_after_another() -> None:
    slots, count = 12, 20000
    law = np.arange(1, slots + 1) ** (0.01 - 1.0)
    law /= law.sum()
    ids, targets = rows(count=count)
    column = np.argmax(ids[:, None, 2 * PAIRS :: 2] == ids[:, 0 : 2 * PAIRS : 2, None], axis=2)  # [rows, key] -> slot
    first = np.bincount(column[:, 0], minlength=slots) / count
    assert np.abs(first - law).max() < 0.012
    second = np.zeros(slots)  # the second draw without repetition, by the law of total probability
    for taken in range(slots):
        rest = law.copy()
        rest[taken] = 0
        second += law[taken] * rest / rest.sum()
    assert np.abs(np.bincount(column[:, 1], minlength=slots) / count - second).max() < 0.012
    assert (targets != IGNORED).sum() == count * PAIRS


def test_batches_are_a_function_of_seed_and_place_and_can_be_resumed() -> None:
    task = Mqar(vocab=64)
    one, two = task.train_batches(8, 32, seed=3), task.train_batches(8, 32, seed=3)
    seen = [next(one) for _ in range(5)]
    for _ in range(3):
        next(two)
    later = task.train_batches(8, 32, seed=3)
    later.load_state_dict(two.state_dict())
    for batch in seen[3:]:
        again = next(later)
        assert torch.equal(again.ids, batch.ids)
        assert torch.equal(again.targets, batch.targets)
        assert bool(again.fresh.all())
    assert not torch.equal(seen[0].ids, seen[1].ids)


def test_training_rows_of_no_seed_are_in_the_test_set() -> None:
    task = Mqar(vocab=64, test_examples=64)  # drawn as one batch of training is: only the key tells them apart
    tested = {tuple(row) for batch in task.evaluation_sets(64, 32)["test"] for row in batch.ids.tolist()}
    assert len(tested) == 64
    for seed in range(3):
        batches = task.train_batches(64, 32, seed)
        trained = {tuple(row) for _ in range(10) for row in next(batches).ids.tolist()}
        assert not trained & tested
    again = {tuple(row) for batch in task.evaluation_sets(7, 32)["test"] for row in batch.ids.tolist()}
    assert again == tested, "the set does not depend on the batch size"


def test_a_fixed_number_of_examples_comes_again() -> None:
    batches = Mqar(vocab=64, examples=12).train_batches(8, 32, seed=0)
    first, second, third = (next(batches).ids for _ in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_mixture_of_lengths_and_further_tests() -> None:
    task = Mqar(vocab=64, train=[[16, 2, 3], [32, 4, 1]], test=[[64, 8], [16, 4]], test_examples=5)
    batches = task.train_batches(4, 32, seed=0)
    lengths = [next(batches).ids.shape[1] for _ in range(200)]
    assert set(lengths) == {16, 32}
    assert 0.65 < lengths.count(16) / 200 < 0.85
    sets = task.evaluation_sets(5, 32)
    assert list(sets) == ["test", "length_16_pairs_2", "length_64_pairs_8", "length_16_pairs_4"]
    shapes = {name: next(iter(found)).ids.shape for name, found in sets.items()}
    assert shapes["test"] == (5, 32)
    assert shapes["length_64_pairs_8"] == (5, 64)


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        ({}, 15, "even length of at least 4 tokens per pair, got length 15 for 4 pairs"),
        ({"pairs": 9}, 32, "got length 32 for 9 pairs"),
        ({"vocab": 8}, 32, "pairs must be at most vocab / 2 - 1, got 4 for vocab 8"),
        ({"train": [[16, 2, 1]]}, 32, "seq_len must be the longest length of task.train, 16, got 32"),
        ({"test": [[30, 8]]}, 32, "got length 30 for 8 pairs"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar(**options).check(seq_len)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fillers": "some"}, "fillers must be one of distinct, any, zero, got 'some'"),
        ({"power": 0}, "power must be a positive number, got 0"),
        ({"pairs": 0}, "pairs must be an integer of at least 1, got 0"),
        ({"test": [[64]]}, r"test must list \[length, pairs\], all positive, got \[64\]"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar(**options)
