"""ListOps: an interpreter of its own, the shape of the grammar, and what the first token tells."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from attention_zoo.tasks.listops import ListOps

WORDS = ["", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
RULES = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
TASK = ListOps(shortest=30, test_examples=300)


def value(words: list[str], depths: list[int], numbers: list[int]) -> int:
    """Reads one expression from the front of `words`."""

    def read(depth: int) -> int:
        word = words.pop(0)
        depths.append(depth)
        if word not in RULES:
            return int(word)
        arguments = []
        while words[0] != "]":
            arguments.append(read(depth + 1))
        words.pop(0)
        numbers.append(len(arguments))
        return RULES[word](arguments)

    return read(1)


def test_an_interpreter_answers_every_row() -> None:
    task = ListOps(shortest=7, depth=4, arguments=5)
    batch = task.draw(np.random.default_rng(0), 600, 41)
    depths, numbers, lengths = [], [], set()
    for ids, valid, answer in zip(batch.ids.tolist(), batch.tokens.valid, batch.targets):
        words = [WORDS[id] for id in ids if id]
        assert [bool(id) for id in ids] == valid.tolist()
        assert 7 <= len(words) <= 41
        lengths.add(len(words))
        assert value(words, depths, numbers) == answer
        assert not words, "one expression and padding, nothing else"
    assert max(depths) == 4
    assert set(numbers) == {2, 3, 4, 5}
    assert len(lengths) > 25


def test_nodes_are_operators_as_often_as_published() -> None:
    batch = ListOps(shortest=4, depth=3, arguments=10).draw(np.random.default_rng(0), 3000, 300)
    second = batch.ids[:, 1]  # nothing of this depth is longer than 122 tokens: no choice by length
    assert abs(float((second >= 11).double().mean()) - 0.25) < 0.025
    operators = np.bincount(batch.ids[:, 0])[11:] / 3000
    assert np.abs(operators - 0.25).max() < 0.03
    digits = np.bincount(second[second < 11])[1:]
    assert digits.max() / digits.min() < 1.4


def test_the_first_token_tells_a_third() -> None:
    task = ListOps(shortest=30)
    found = task.baselines(64)
    assert abs(found["majority"] - 0.155) < 0.04
    assert abs(found["first_token"] - 0.335) < 0.045
    assert found["first_two_tokens"] > found["majority"] + 0.1
    assert task.chance(64) == found["majority"]
    task.evaluation_sets(100, 64)
    assert task.score(1.0, 0.5)["over_first_token"] == 0.5 - found["first_token"]


def test_the_median_is_rounded_down_and_sums_wrap() -> None:
    batch = ListOps(shortest=4, depth=2, arguments=4).draw(np.random.default_rng(1), 2000, 6)
    seen = {}
    for ids, answer in zip(batch.ids.tolist(), batch.targets.tolist()):
        seen[" ".join(WORDS[id] for id in ids if id)] = answer
    assert len(seen) > 1000
    assert all(
        answer == (int(text[5]) + int(text[7])) // 2
        for text, answer in seen.items()
        if text[:4] == "[MED" and len(text) == 10
    )
    assert any(sum(map(int, text[4:-2].split())) >= 10 for text in seen if text[:3] == "[SM")


def test_rows_follow_from_the_key_and_splits_never_meet() -> None:
    one, two = next(TASK.train_batches(16, 61, 0)), next(ListOps(shortest=30).train_batches(16, 61, 0))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, next(TASK.train_batches(16, 61, 1)).ids)
    sets = TASK.evaluation_sets(100, 61)
    seen = {name: {tuple(row) for batch in part for row in batch.ids.tolist()} for name, part in sets.items()}
    seen["train"] = {tuple(row) for seed in range(3) for row in next(TASK.train_batches(200, 61, seed)).ids.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"listops: seq_len must be at least 30, task.shortest, got 29"):
        TASK.check(29)
    with pytest.raises(ValueError, match=r"found no expression of 50 to 60 tokens with task.depth=2"):
        ListOps(shortest=50, depth=2, arguments=3).draw(np.random.default_rng(0), 4, 60)
