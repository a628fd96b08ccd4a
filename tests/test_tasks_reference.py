"""References: a reader follows every link, places are uniform, and no rule without links writes a row right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.reference import BEGIN, END, PAD, Reference

OPTIONS = {"references": 3, "spare": 2, "names": 12, "values": 5, "fillers": 4}
NUMBERS, NAMES, VALUES = range(3, 6), range(6, 18), range(18, 23)
"""Ids of `OPTIONS`: after beginning, end and padding."""


def followed(source: list[int]) -> tuple[list[int], list[int], int]:
    """Values of the references in the order of their numbers, each one's longest link, and records on the way."""
    records = {}
    place = 0
    while place < len(source):
        left = source[place]
        if left in NUMBERS or left in NAMES:
            assert left not in records, "defined once"
            records[left] = (source[place + 1], place)
            place += 1
        place += 1
    answers, gaps, most = [], [], 0
    for number in NUMBERS:
        (what, place), links, steps = records[number], [0], 0
        while what in NAMES:
            what, there = records[what]
            links.append(abs(there - place))
            place, steps = there, steps + 1
        answers.append(what)
        gaps.append(max(links))
        most = max(most, steps)
    return answers, gaps, most


@pytest.mark.parametrize(("hops", "length"), [(1, 16), (1, 31), (2, 29), (2, 64)])
def test_a_reader_follows_every_link(hops: int, length: int) -> None:
    task = Reference(hops=hops, **OPTIONS)
    task.check(length)
    batch = task.draw(np.random.default_rng(0), 300, length)
    assert batch.source_tokens is None
    for source, ids, targets, distance in zip(batch.source, batch.ids, batch.targets, batch.groups["distance"]):
        answers, gaps, most = followed(source.tolist())
        assert targets.tolist() == [*answers, END]
        assert ids.tolist() == [BEGIN, *answers]
        assert distance.tolist() == [*gaps, -1]
        assert most == hops
        assert int(source.max()) < task.vocab


def test_padded_sources_have_every_length() -> None:
    batch = Reference(shortest=20, **OPTIONS).draw(np.random.default_rng(0), 600, 33)
    lengths = batch.source_tokens.valid.sum(1)
    assert set(lengths.tolist()) == set(range(20, 34))
    for source, length, targets in zip(batch.source.tolist(), lengths, batch.targets.tolist()):
        assert PAD not in source[:length]
        assert set(source[length:]) <= {PAD}
        assert followed(source[:length])[0] == targets[:-1]


def test_lessons_hold_the_value_itself_and_are_trained_on_alone() -> None:
    task = Reference(direct=0.5, **OPTIONS)
    batches = task.train_batches(4, 31, 0)
    hops = [{followed(row)[2] for row in next(batches).source.tolist()} for _ in range(60)]
    assert {1} in hops
    assert {0} in hops
    assert 15 < hops.count({0}) < 45
    for part in task.evaluation_sets(100, 31).values():
        assert all(followed(row)[2] == 1 for batch in part for row in batch.source.tolist())
    lesson = task.draw(np.random.default_rng(0), 100, 31, direct=True)
    assert all(followed(row)[0] == said[:-1] for row, said in zip(lesson.source.tolist(), lesson.targets.tolist()))


def test_records_stand_anywhere_in_any_order() -> None:
    batch = Reference(references=1, spare=0, names=4, values=5, fillers=4).draw(np.random.default_rng(0), 20000, 8)
    source = batch.source.numpy()
    reference, definition = (source == 3).argmax(1), ((source >= 8) & (source < 13)).argmax(1) - 1
    _, counts = np.unique(np.stack([reference, definition]), axis=1, return_counts=True)
    assert len(counts) == 30, "two records among four fillers: six slots"
    assert counts.max() / counts.min() < 1.4


def test_rules_without_links_fail() -> None:
    task = Reference()
    found = task.baselines(64)
    assert set(found) == {"nearest", "in_order", "commonest"}
    assert max(found.values()) < 0.03
    assert task.chance(64) == 8.0**-4


def test_rows_follow_from_the_key_and_splits_never_meet() -> None:
    task = Reference(test_examples=200, **OPTIONS)
    one, two = next(task.train_batches(32, 24, 0)), next(task.train_batches(32, 24, 0))
    assert torch.equal(one.source, two.source)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.source, next(task.train_batches(32, 24, 1)).source)
    sets = task.evaluation_sets(50, 24)
    seen = {name: {tuple(row) for batch in part for row in batch.source.tolist()} for name, part in sets.items()}
    seen["train"] = {tuple(r) for seed in range(3) for r in next(task.train_batches(300, 24, seed)).source.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="reference: seq_len must be at least 16, 8 records, got 15"):
        Reference(**OPTIONS).check(15)
    with pytest.raises(ValueError, match=r"task.shortest must be at most the source's length, 24, got 30"):
        Reference(shortest=30, **OPTIONS).check(24)
    with pytest.raises(ValueError, match=r"names must be at least \(references \+ spare\) \* hops, 12, got 10"):
        Reference(names=10, hops=2)
