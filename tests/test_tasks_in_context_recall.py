"""In-context recall: values are found again by rules that know nothing of the generator, and pairs stand anywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from attention_zoo.tasks.generated import Setting
from attention_zoo.tasks.in_context_recall import InContextRecall, _different, _earlier
from attention_zoo.tasks.task import IGNORED, Batch

VARIANTS: list[dict] = [
    {},
    {"prefix": 7},
    {"noise": 0.5, "noise_vocab": 3},
    {"keys": 4, "values": 5, "fuzzy": 2},
    {"keys": 3, "values": 3, "fuzzy": 3, "noise": 0.3, "prefix": 4},
    {"keys": 20, "values": 4, "repeat": False},
]


def rows_of(task: InContextRecall, length: int, count: int = 300) -> Batch:
    return next(task.train_batches(count, length, seed=0))


def solve(row: list[int], keys: int, values: int) -> dict[int, int]:
    """What to answer at each column: runs of keys and of values take turns, a known run of keys asks for its values."""
    kind = ["key" if token < keys else "value" if token < keys + values else "other" for token in row]
    runs: list[tuple[str, list[int]]] = []
    for column, token_kind in enumerate(kind):
        if runs and runs[-1][0] == token_kind:
            runs[-1][1].append(column)
        else:
            runs.append((token_kind, [column]))
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    answers: dict[int, int] = {}
    for (first, at), (second, then) in pairwise(runs):
        if (first, second) == ("key", "value"):
            key, value = tuple(row[i] for i in at), tuple(row[i] for i in then)
            if key in known:
                answers |= dict(zip([at[-1], *then], known[key]))
                assert known[key] == value
            known[key] = value
    return answers


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [37, 40])
def test_a_solver_that_reads_the_row_alone_answers_all_of_it(options: dict, length: int) -> None:
    task = InContextRecall(**options)
    batch = rows_of(task, length)
    for row, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        asked = {column: target for column, target in enumerate(targets) if target != IGNORED}
        assert solve(row, task.keys, task.values) == asked
        assert asked, "every row asks"
        assert max(asked) >= length - 1 - task.fuzzy, "a question stands at the end"


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_distance_leads_from_the_question_to_its_evidence(options: dict) -> None:
    batch = rows_of(InContextRecall(**options), 41)
    row, column = torch.nonzero(batch.targets != IGNORED, as_tuple=True)
    distance = batch.groups["distance"][row, column]
    assert (distance > 0).all()
    assert (batch.ids[row, column - distance] == batch.targets[row, column]).all()
    assert ((batch.groups["distance"] >= 0) == (batch.targets != IGNORED)).all()


def even(counts: np.ndarray, least: float = 0.85) -> bool:
    return bool(counts.min() > least * counts.max())


def test_keys_values_tuples_and_places_are_uniform() -> None:
    batch = rows_of(InContextRecall(prefix=7), 33, 6000)
    blanks = (batch.ids == 16).sum(1).numpy()
    assert even(np.bincount(blanks // 2)[1:4]), "the prefix is of any length"
    first = batch.ids[torch.arange(6000), torch.from_numpy(blanks)]
    assert even(np.bincount(first.numpy(), minlength=8))
    assert even(torch.bincount(batch.targets[batch.targets != IGNORED])[8:].numpy())
    batch = rows_of(InContextRecall(keys=30, values=4, repeat=False), 22, 6000)
    assert even(np.bincount(batch.groups["distance"].amax(1).numpy())[1::2], 0.75), "any pair is asked for"
    found = _different(np.random.default_rng(0), (300, 100), 4, 2)
    assert (found[..., 0] != found[..., 1]).all()
    counts = np.bincount((4 * found[..., 0] + found[..., 1]).ravel(), minlength=16)
    assert even(counts[counts > 0])
    assert (counts > 0).sum() == 12


def test_options_are_kept() -> None:
    ids = rows_of(InContextRecall(noise=0.25, noise_vocab=3), 64, 2000).ids
    assert float(((ids >= 16) & (ids < 19)).double().mean()) == pytest.approx(0.25 * 30 / 32, abs=0.01)
    batch = rows_of(InContextRecall(keys=20, values=4, repeat=False), 10)
    assert all(len(set(row[0:8:2])) == 4 for row in batch.ids.tolist())
    assert ((batch.targets != IGNORED).sum(1) == 1).all()
    task = InContextRecall(keys=5, values=5, fuzzy=2)
    setting = task.tested(40)["longest_keys"]
    assert setting == Setting(40, (("longest", True),))
    for row in task.batch("test", (), 50, setting).ids.tolist():
        text = "".join("k" if token < 5 else " " for token in row)
        assert {len(run) for run in text.split()} == {2}


def test_earlier_finds_the_first_and_the_last_before() -> None:
    first, previous = _earlier(np.array([[5, 2, 5, 5, -1, 2], [1, 2, 3, 4, 5, 6]]))
    assert first.tolist() == [[0, 1, 0, 0, 4, 1], [0, 1, 2, 3, 4, 5]]
    assert previous.tolist() == [[-1, -1, 0, 2, -1, 1], [-1] * 6]


@pytest.mark.parametrize(
    ("options", "length", "expected"),
    [
        ({}, 64, {"commonest value": 0.33, "last value": 0.26}),
        ({"keys": 26, "values": 10, "repeat": False}, 10, {"commonest value": 0.39, "last value": 0.33}),
        ({"keys": 4, "values": 4, "fuzzy": 2}, 64, {"commonest value": 0.37, "last value": 0.20, "last token": 0.71}),
    ],
)
def test_trivial_rules_fail(options: dict, length: int, expected: dict[str, float]) -> None:
    task = InContextRecall(**options)
    assert task.baselines(length) == pytest.approx(expected, abs=0.04)
    batch = rows_of(task, length, 2000)
    asked = batch.targets != IGNORED
    one = (batch.targets[asked] == task.keys).double().mean()
    assert float(one) == pytest.approx(1 / task.values, abs=0.02), "one value always"
    blind = {1: 1 / task.values, 2: (2 / 4 + 1 / 3) / 3}[task.fuzzy]
    assert task.chance(length) == pytest.approx(blind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuzzy": 4}, "fuzzy must be at most 3, got 4"),
        ({"keys": 2, "fuzzy": 3}, "fuzzy must be at most keys and values, 2 and 8, got 3"),
        ({"repeat": False, "noise": 0.5}, "repeat=false takes neither fuzzy nor noise, got fuzzy=1, noise=0.5"),
        ({"noise": 1.0}, "noise must be"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InContextRecall(**options)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"fuzzy": 2, "prefix": 3}, 10, "seq_len must be at least 11, the prefix and a pair twice, got 10"),
        ({"test": [3]}, 64, "task.test must be at least 4, .* got 3"),
        ({"repeat": False}, 20, "task.keys must be at least 9, that many differ .* got 8"),
    ],
)
def test_rows_that_do_not_fit_are_refused(options: dict, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InContextRecall(**options).check(length)
