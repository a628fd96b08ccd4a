"""Lessons before quote matching: what each holds, that steps alone tell which, and that evaluation knows none."""

from __future__ import annotations

from itertools import combinations, islice, pairwise
from statistics import fmean
from typing import Any

import pytest
import torch

from attention_zoo.tasks.generated import PARTS, part_of
from attention_zoo.tasks.quote import SEPARATOR, Quote
from attention_zoo.tasks.quote_lessons import Lessons, lesson_at, lessons_for
from attention_zoo.training import timing
from attention_zoo.training.building import build
from attention_zoo.training.config import check, compose_training, options_of

LESSONS = 60
OPTIONS: dict[str, Any] = {"quote": 16, "seam": 2, "background": "random", "bytes": 32, "test_examples": 64}
TAUGHT, PLAIN = Quote(**OPTIONS, lessons=LESSONS), Quote(**OPTIONS)


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


def twins_of(quote: bytes) -> list[bytes]:
    """The quote with two of its quarters exchanged, in each of the six ways."""
    size = len(quote) // 4
    found = []
    for i, j in combinations(range(4), 2):
        parts = [quote[at : at + size] for at in range(0, len(quote), size)]
        parts[i], parts[j] = parts[j], parts[i]
        found.append(b"".join(parts))
    return found


def test_a_reader_of_the_rules_answers_every_lesson() -> None:
    found: dict[str, set[bool]] = {}
    for step, batch in enumerate(islice(TAUGHT.train_batches(32, 64, 0), LESSONS)):
        changes = dict(lesson_at(step, LESSONS, 16, 64).changes)
        for ids, answer, types in zip(batch.ids.tolist(), batch.targets.tolist(), batch.types.tolist(), strict=True):
            border = ids.index(SEPARATOR)
            document, quote = bytes(ids[:border]), bytes(ids[border + 1 :])
            assert len(quote) == changes["quote"] <= len(document) <= 2 * len(quote)
            assert types == [0] * border + [1] * (len(quote) + 1)
            assert (quote in document) == answer
            if not answer:
                exchanged = any(twin in document for twin in twins_of(quote))
                found.setdefault(changes["twin"], set()).add(exchanged)
        assert 4 <= int(batch.targets.sum()) <= 28
    assert found["exchanged"] == {True}
    assert found["mixed"] == {True, False}, "either kind stands in the same batches"
    assert False in found["unrelated"]
    assert len(found) == 3


@pytest.mark.parametrize("quote", [8, 12, 16, 64, 100])
def test_lessons_grow_and_end_with_the_tasks_quote(quote: int) -> None:
    settings = [lesson_at(step, 1000, quote, 3 * quote + 1) for step in range(1000)]
    sizes = [dict(setting.changes)["quote"] for setting in settings]
    assert (sizes[0], sizes[-1]) == (4, quote)
    assert sizes == sorted(sizes)
    assert all(later <= 2 * earlier for earlier, later in pairwise(sizes))
    lengths = [setting.length for setting in settings]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (9, 3 * quote + 1)
    assert set(range(9, 14)) <= set(lengths)
    assert dict(settings[-1].changes)["twin"] == "exchanged"
    assert sum(lesson.share for lesson in lessons_for(quote)) == pytest.approx(1)
    assert lesson_at(1000, 1000, quote, 64) is None


def test_no_lesson_is_longer_than_the_tasks_rows() -> None:
    assert max(batch.ids.shape[1] for batch in islice(TAUGHT.train_batches(2, 45, 0), LESSONS)) == 45


def test_evaluation_and_what_follows_the_lessons_are_the_tasks_own() -> None:
    sets, plain = (task.evaluation_sets(64, 64) for task in (TAUGHT, PLAIN))
    assert set(sets) == set(plain)
    for name in sets:
        assert all(same(a, b) for a, b in zip(sets[name], plain[name], strict=True))
    assert TAUGHT.baselines(64) == PLAIN.baselines(64)
    taught, untaught = (list(islice(task.train_batches(4, 64, 0), LESSONS + 3)) for task in (TAUGHT, PLAIN))
    for step, (a, b) in enumerate(zip(taught, untaught, strict=True)):
        assert (a.ids.shape == b.ids.shape and same(a, b)) == (step >= LESSONS)


@pytest.mark.parametrize("step", [0, 1, 28, 41, 59, 60, 61])
def test_training_goes_on_at_any_step(step: int) -> None:
    first, again = TAUGHT.train_batches(4, 64, 5), TAUGHT.train_batches(4, 64, 5)
    for _ in range(step):
        next(first)
    again.load_state_dict(first.state_dict())
    assert isinstance(again, Lessons)
    assert all(same(next(first), next(again)) for _ in range(3))
    assert not same(TAUGHT.train_batches(4, 64, 5).__next__(), TAUGHT.train_batches(4, 64, 6).__next__())


def test_lessons_are_of_the_training_split() -> None:
    for batch in islice(TAUGHT.train_batches(8, 64, 0), LESSONS):
        assert set(part_of(batch).tolist()) <= set(PARTS["train"])


def test_lessons_go_with_text_global_tokens_and_shorter_documents() -> None:
    task = Quote(
        quote=16, seam=2, lessons=10, global_quote=True, compress={"method": "head", "budget": 20}, test_examples=8
    )
    for step, batch in enumerate(islice(task.train_batches(4, 64, 0), 12)):
        setting = lesson_at(step, 10, 16, 64)
        quote = 16 if setting is None else dict(setting.changes)["quote"]
        length = 64 if setting is None else setting.length
        assert batch.ids.shape[1] == min(20, length - quote - 1) + quote + 1
        assert batch.tokens.is_global.sum(1).tolist() == [quote + 1] * 4


@pytest.mark.parametrize("value", [-1, 1.5, "many", True])
def test_what_is_no_number_of_steps_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lessons must be .*, got ") as refused:
        Quote(lessons=value)
    assert "\n" not in str(refused.value)


def test_a_run_is_timed_where_its_rows_are_long_too(monkeypatch) -> None:
    """As if a step took a second a token: the first rows are a fifth of the last."""
    monkeypatch.setattr(timing, "_seconds", lambda trainer, steps, enough: [float(next(trainer.batches).ids.shape[1])])
    words = ["task=quote", "attention=full", "device=cpu", "steps=240", "task.lessons=110", "model.depth=1"]
    config = compose_training(words)
    task = build(options_of(check(config)).task, "task")
    batches = task.train_batches(1, config["seq_len"], 0)
    exact = fmean(next(batches).ids.shape[1] for _ in range(config["steps"]))
    (found,) = timing.timed_steps(config, 1)["seconds"]
    assert 0.9 * exact < found < 1.1 * exact
    (first,) = timing.timed_steps(compose_training([*words, "task.lessons=0"]), 1)["seconds"]
    assert first == config["seq_len"]
