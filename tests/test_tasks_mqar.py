"""MQAR: the rows obey the rules, the draws obey the published law, and every row is a function of seed and place."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from attention_zoo.tasks import IGNORED, Batch, Mqar

PAIRS, LENGTH, VOCAB = 4, 32, 24


def rows(count: int = 300, length: int = LENGTH, **options: Any) -> Batch:
    task = Mqar(**{"pairs": PAIRS, "vocab": VOCAB, "prefix": 0, **options})
    task.check(length)
    return task.draw(np.random.default_rng(0), count, length)


def solved(row: list[int], width: int) -> list[int]:
    """What stood behind the last `width` tokens when they came before, for each column; written from the rules."""
    found = []
    for column in range(len(row)):
        key = row[column - width + 1 : column + 1]
        before = [at for at in range(column - width + 1) if row[at : at + width] == key]
        found.append(row[before[-1] + width] if before and len(key) == width else -1)
    return found


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 64),
        ({"prefix": None}, 61),
        ({"prefix": 5, "noise": 0.4, "fillers": "zero"}, 47),
        ({"updates": 3, "prefix": None, "power": 1.0}, 64),
        ({"compositional": True, "prefix": None, "power": 1.0}, 64),
        ({"compositional": True, "updates": 2, "noise": 0.2, "prefix": None}, 67),
        ({"questions": 1, "values": 7, "prefix": None}, 40),
    ],
)
def test_the_last_pair_of_a_key_answers_every_question(options: dict[str, Any], length: int) -> None:
    batch = rows(length=length, vocab=40, **options)
    width = 2 if options.get("compositional") else 1
    asked = batch.targets != IGNORED
    assert (asked.sum(1) == options.get("questions", PAIRS)).all()
    for row, targets, distance in zip(batch.ids.tolist(), batch.targets.tolist(), batch.groups["distance"].tolist()):
        for column, (target, found) in enumerate(zip(targets, solved(row, width))):
            if target != IGNORED:
                assert found == target
                assert row[column - distance[column]] == target, "the distance leads to the value"
    assert ((batch.groups["distance"] >= 0) == asked).all()
    assert ((batch.groups["key"] >= 0) == asked).all()


def test_each_key_is_asked_once_and_its_value_is_the_answer() -> None:
    batch = rows()
    context = 2 * PAIRS
    for row, answer in zip(batch.ids.numpy(), batch.targets.numpy()):
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


def test_neither_half_of_a_compositional_key_decides() -> None:
    batch = rows(compositional=True, pairs=9, length=54, vocab=60)
    for row in batch.ids.tolist():
        pairs = [tuple(row[at : at + 3]) for at in range(0, 27, 3)]
        assert Counter(first for first, _, _ in pairs).most_common()[-1][1] == 3
        assert Counter(second for _, second, _ in pairs).most_common()[-1][1] == 3
        assert len({(first, second) for first, second, _ in pairs}) == 9
        assert len({value for _, _, value in pairs}) == 9
        assert all(1 <= first < 20 <= second < 40 <= value for first, second, value in pairs)


def test_updates_come_after_all_pairs_with_other_values() -> None:
    batch = rows(updates=2, vocab=40)
    for row in batch.ids.tolist():
        pairs = [tuple(row[at : at + 2]) for at in range(0, 12, 2)]
        old = dict(pairs[:4])
        assert len({key for key, _ in pairs[4:]}) == 2
        assert all(key in old and old[key] != value for key, value in pairs[4:])


def test_pairs_stand_anywhere_in_the_prefix_and_noise_in_every_arrangement() -> None:
    batch = rows(4000, 64, prefix=None, power=1.0)
    start = (batch.groups["distance"] >= 0).int().argmax(1)  # a question of each row, and the first pair's column
    question = batch.groups["distance"].gather(1, start[:, None]), batch.groups["key"].gather(1, start[:, None])
    first = start[:, None] - question[0] - 1 - 2 * question[1]
    counts = torch.bincount(first[:, 0], minlength=17)
    assert len(counts) == 17
    assert counts.min() / counts.max() > 0.7, "0 to a quarter of the row, each as likely"
    noisy = rows(6000, 40, pairs=2, noise=0.5, fillers="zero")  # two pairs and four fillers in eight columns
    arrangements = Counter(tuple(row) for row in (noisy.ids[:, :8] == 0).tolist())
    assert len(arrangements) == 15
    assert min(arrangements.values()) / max(arrangements.values()) > 0.7


def test_fillers_never_collide_with_keys_unless_asked_for_as_published() -> None:
    def collisions(fillers: str) -> int:
        batch = rows(fillers=fillers)
        filler = batch.targets.numpy() == IGNORED
        filler[:, : 2 * PAIRS] = False
        return sum(np.isin(row[free], row[0 : 2 * PAIRS : 2]).sum() for row, free in zip(batch.ids.numpy(), filler))

    assert collisions("distinct") == 0
    assert collisions("any") > 100
    batch = rows(fillers="zero")
    assert (batch.ids[:, 2 * PAIRS :][batch.targets[:, 2 * PAIRS :] == IGNORED] == 0).all()


def test_distinct_fillers_are_uniform_over_all_other_ids() -> None:
    batch = rows(4000)
    free = (batch.targets[:, 2 * PAIRS :] == IGNORED).numpy()
    found = np.bincount(batch.ids[:, 2 * PAIRS :].numpy()[free], minlength=VOCAB) / free.sum()
    other = 1 / (VOCAB - PAIRS)  # ids that are never keys: 0 and the values
    assert np.abs(found[[0, *range(VOCAB // 2, VOCAB)]] - other).max() < 0.003
    keyable = (1 - PAIRS / (VOCAB // 2 - 1)) * other  # each lower id is a key of some rows, and then no filler there
    assert np.abs(found[1 : VOCAB // 2] - keyable).max() < 0.003


def test_query_slots_follow_the_power_law_drawn_one_after_another() -> None:
    slots, count = 12, 20000
    law = np.arange(1, slots + 1) ** (0.01 - 1.0)
    law /= law.sum()
    batch = rows(count)
    ids = batch.ids.numpy()
    column = np.argmax(ids[:, None, 2 * PAIRS :: 2] == ids[:, 0 : 2 * PAIRS : 2, None], axis=2)  # [rows, key] -> slot
    first = np.bincount(column[:, 0], minlength=slots) / count
    assert np.abs(first - law).max() < 0.012
    second = np.zeros(slots)  # the second draw without repetition, by the law of total probability
    for taken in range(slots):
        rest = law.copy()
        rest[taken] = 0
        second += law[taken] * rest / rest.sum()
    assert np.abs(np.bincount(column[:, 1], minlength=slots) / count - second).max() < 0.012
    assert (batch.targets != IGNORED).sum() == count * PAIRS


def test_trivial_rules_reach_what_they_can() -> None:
    plain = Mqar(vocab=128).baselines(64)
    assert plain["last value"] == pytest.approx(0.25)
    assert plain["commonest value"] < 0.15
    assert Mqar(vocab=128, updates=2).baselines(64)["first value"] == pytest.approx(0.5, abs=0.01)
    assert Mqar(vocab=129, compositional=True).baselines(64)["first half"] == pytest.approx(0.5)
    one = Mqar(vocab=37, values=10, questions=1)
    assert one.baselines(64)["last value"] == pytest.approx(0.25, abs=0.04)
    assert (one.chance(64), Mqar(vocab=128).chance(64)) == (0.1, 1 / 64)
    assert set(Mqar(vocab=128, noise=0.3, questions=2).baselines(64)) == {"commonest value"}


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
    assert not torch.equal(next(task.train_batches(8, 32, seed=4)).ids, seen[0].ids)


def test_rows_of_one_split_are_in_no_other() -> None:
    task = Mqar(vocab=8, pairs=1, fillers="zero", prefix=0, test_examples=64)  # so few rows that each comes often
    held = {
        name: {tuple(row) for batch in task.evaluation_sets(64, 8)[name] for row in batch.ids.tolist()}
        for name in ("validation", "test")
    }
    assert not held["validation"] & held["test"]
    for seed in range(3):
        batches = task.train_batches(64, 8, seed)
        trained = {tuple(row) for _ in range(10) for row in next(batches).ids.tolist()}
        assert not trained & (held["validation"] | held["test"])
    again = {tuple(row) for batch in task.evaluation_sets(7, 8)["test"] for row in batch.ids.tolist()}
    assert again == held["test"], "the set does not depend on the batch size"


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
    assert list(sets) == ["validation", "test", "length_16_pairs_2", "length_64_pairs_8", "length_16_pairs_4"]
    found = {name: next(iter(batches)) for name, batches in sets.items()}
    assert found["test"].ids.shape == (5, 32)
    assert found["length_64_pairs_8"].ids.shape == (5, 64)
    assert ((found["length_64_pairs_8"].targets != IGNORED).sum(1) == 8).all()


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        ({}, 15, "mqar: seq_len must be at least 16, 4 pairs and their questions, got 15"),
        ({"pairs": 9}, 32, "seq_len must be at least 36, 9 pairs .* got 32"),
        ({"vocab": 8}, 32, "pairs must be at most 3 where the vocabulary has that many keys, got 4 for vocab 8"),
        ({"values": 3}, 32, "pairs and updates must be at most the number of values, got 4 of 3 for vocab 8192"),
        ({"updates": 5}, 64, "updates must be at most pairs, got 5 of 4"),
        ({"questions": 5}, 64, "questions must be at most pairs, got 5 of 4"),
        ({"pairs": 5, "compositional": True}, 64, "pairs must be a square number where keys are compositional, got 5"),
        ({"train": [[16, 2, 1]]}, 32, "seq_len must be the longest length of task.train, 16, got 32"),
        ({"test": [[30, 8]]}, 32, "task.test must be at least 32, 8 pairs .* got 30"),
        ({"train": [[15, 4, 1], [64, 4, 1]]}, 64, "task.train must be at least 16, 4 pairs .* got 15"),
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
        ({"noise": 1.0}, "noise must be a probability below 1, got 1.0"),
        ({"values": 8192}, "values must leave ids for keys, at most vocab - 2, got 8192 of 8192"),
        ({"test": [[64]]}, r"test must list \[length, pairs\], all positive, got \[64\]"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar(**options)
