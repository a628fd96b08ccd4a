"""Quotes: a reader that searches, a label that neither side tells alone, and what pieces of n bytes tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.quote import SEPARATOR, Quote

SMALL = Quote(quote=16, seam=2, background="random", test_examples=400)


def rows(task: Quote = SMALL, count: int = 2000, length: int = 61):
    return task.draw(np.random.default_rng(0), count, length)


@pytest.mark.parametrize("seam", [0, 2])
@pytest.mark.parametrize("length", [45, 61, 64])
def test_a_reader_of_the_rules_answers_every_row(length: int, seam: int) -> None:
    batch = rows(Quote(quote=16, seam=seam, background="random"), 500, length)
    for ids, answer, types, distance in zip(batch.ids.tolist(), batch.targets, batch.types, batch.groups["distance"]):
        border = ids.index(SEPARATOR)
        document, quote = bytes(ids[:border]), bytes(ids[border + 1 :])
        assert len(quote) == 16
        assert (quote in document) == answer
        assert types.tolist() == [0] * border + [1] * 17
        place = border + 1 - int(distance)
        parts = [quote[i : i + 4] for i in range(0, 16, 4)]
        passage = document[place : place + 16]
        moved = [part for i, part in enumerate(parts) if passage[4 * i : 4 * i + 4] != part]
        assert len(moved) == (0 if answer else 2)
        assert sorted(parts) == sorted(passage[i : i + 4] for i in range(0, 16, 4)), "the same four quarters"
    assert abs(float(batch.targets.double().mean()) - 0.5) < 0.07


def test_one_side_alone_has_the_same_law_whatever_the_label() -> None:
    class Rising(Quote):
        def _cut(self, random, rows, size):
            return (random.integers(0, 200, (rows, 1)) + np.arange(size)) % 200  # every seam can be seen

    task = Rising(quote=16, seam=0, background="random")
    batch = rows(task, 8000, 61)
    for part in (batch.ids[:, :44], batch.ids[:, 45:]):
        steps = (part[:, 1:] - part[:, :-1]) % 200
        broken = (steps != 1).sum(1)
        means = [float(broken[batch.targets == answer].double().mean()) for answer in (0, 1)]
        assert abs(means[0] - means[1]) < 0.09
        seam_by_label = [float((broken > 2)[batch.targets == answer].double().mean()) for answer in (0, 1)]
        assert abs(seam_by_label[0] - seam_by_label[1]) < 0.05


def test_places_are_uniform_and_tell_nothing() -> None:
    batch = rows(count=12000, length=48)  # a document of 31 bytes: 28 in pieces
    distance = batch.groups["distance"].numpy()
    for answer in (0, 1):
        counts = np.bincount(distance[batch.targets.numpy() == answer])
        assert set(np.flatnonzero(counts)) <= set(range(17, 33))
    early, late = (distance >= 25).mean(), (distance < 25).mean()
    assert abs(early - late) < 0.1, "as often in the first half as in the second"
    free = rows(Quote(quote=16, seam=0, background="random"), 12000, 48).groups["distance"].numpy()
    counts = np.bincount(free)[17:]
    assert len(counts) == 16
    assert counts.max() / counts.min() < 1.3


@pytest.mark.parametrize("background", ["random", "text"])
def test_short_pieces_tell_nothing_with_seams(background: str) -> None:
    found = Quote(background=background, test_examples=600).baselines(257)
    assert set(found) == {"place", "bag_of_bytes", "bigrams", "trigrams", "fourgrams"}
    assert all(abs(value - 0.5) < 0.09 for value in found.values())


def test_only_pieces_that_a_seam_hides_are_trivial() -> None:
    found = SMALL.baselines(64)
    assert set(found) == {"place", "bag_of_bytes", "bigrams", "trigrams"}
    assert found.pop("place") < 0.7
    assert all(abs(value - 0.5) < 0.09 for value in found.values())


def test_pieces_longer_than_a_seam_tell_and_without_seams_short_ones_do() -> None:
    assert Quote(seam=0, background="random", test_examples=300).baselines(257)["bigrams"] > 0.97
    batch = rows()
    for ids, answer in zip(batch.ids.tolist(), batch.targets):
        document, quote = bytes(ids[:44]), bytes(ids[45:])
        pieces = {n: all(quote[i : i + n] in document for i in range(17 - n)) for n in (3, 6)}
        assert pieces[3], "seam + 1 bytes are always there"
        assert pieces[6] == answer


def test_quotes_may_be_global_tokens() -> None:
    batch = rows(Quote(quote=16, seam=2, background="random", global_quote=True), 8)
    assert torch.equal(batch.tokens.is_global, batch.types.bool())
    assert rows(count=8).tokens is None


def test_rows_follow_from_the_key_and_splits_never_meet() -> None:
    one, two = next(SMALL.train_batches(32, 53, 0)), next(SMALL.train_batches(32, 53, 0))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.ids, next(SMALL.train_batches(32, 53, 1)).ids)
    sets = SMALL.evaluation_sets(100, 53)
    seen = {name: {tuple(row) for batch in part for row in batch.ids.tolist()} for name, part in sets.items()}
    seen["train"] = {tuple(row) for seed in range(3) for row in next(SMALL.train_batches(300, 53, seed)).ids.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quote": 18}, "quote must be a multiple of 4, got 18"),
        ({"quote": 16, "seam": 3}, "seam must be at most an eighth of the quote, 2, got 3"),
        ({"background": "noise"}, "background must be one of random, text, got 'noise'"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quote(**options)


def test_rows_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quote: seq_len must be at least 45, a quote of 16 bytes and .* got 44"):
        SMALL.check(44)
