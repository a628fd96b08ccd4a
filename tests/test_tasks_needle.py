"""Needles: reading the records answers every question, they stand at every depth, and the text behind them is real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.tasks.needle import Needle
from attention_zoo.tasks.task import IGNORED, Batch

VARIANTS: list[dict] = [
    {},
    {"keys": 1, "value_bytes": 1},
    {"keys": 4, "queries": 4, "key_bytes": 3},
    {"keys": 1, "values": 4},
    {"keys": 3, "values": 2, "queries": 2, "alphabet": 245},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file whose place can be read off it: numbered words, and bytes that stand for records."""
    path: Path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_bytes(b"".join(b"%d \xf5\xff" % number for number in range(5000)))
    return str(path)


def rows_of(task: Needle, length: int, count: int = 100) -> Batch:
    return next(task.train_batches(count, length, seed=0))


def solve(row: list[int], size: int, width: int) -> dict[int, int]:
    """What to answer at each column: keys of `size` bytes, values of `width`."""
    values: dict[tuple[int, ...], list[int]] = {}
    answers = {}
    for at, token in enumerate(row):
        key = tuple(row[at + 1 : at + 1 + size])
        if token == 0xF5:
            values.setdefault(key, []).extend(row[at + 1 + size : at + 1 + size + width])
        elif token == 0xF6:
            answers |= dict(enumerate(values[key], start=at + size))
    return answers


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [101, 128])
def test_reading_the_records_answers_all(options: dict, length: int, text: str) -> None:
    task = Needle(path=text, **options)
    batch = rows_of(task, length)
    size, width = options.get("key_bytes", 2), options.get("value_bytes", 2)
    for row, targets in zip(batch.ids.tolist(), batch.targets.tolist()):
        asked = {column: target for column, target in enumerate(targets) if target != IGNORED}
        assert solve(row, size, width) == asked
        assert len(asked) == options.get("queries", 1) * options.get("values", 1) * width
        assert row.count(0xF5) == options.get("keys", 4) * options.get("values", 1)
    row, column = torch.nonzero(batch.targets != IGNORED, as_tuple=True)
    distance = batch.groups["distance"][row, column]
    assert (batch.ids[row, column - distance] == batch.targets[row, column]).all()
    depth = batch.groups["depth"]
    assert ((depth >= 0) == (batch.targets != IGNORED)).all()
    assert (depth <= 9).all()


def test_keys_of_a_row_differ_in_one_or_two_bytes(text: str) -> None:
    batch = rows_of(Needle(path=text, keys=6, key_bytes=3), 128)
    differing = set()
    for row in batch.ids.tolist():
        keys = [row[at + 1 : at + 4] for at, token in enumerate(row) if token == 0xF5]
        between = np.array([[sum(a != b for a, b in zip(one, two)) for two in keys] for one in keys])
        differing |= set(between[~np.eye(6, dtype=bool)].tolist())
        assert (between.max(axis=1) <= 1).any(), "one differs from each other key in one byte"
    assert differing == {1, 2}


def test_records_stand_at_every_depth_and_any_of_them_is_asked_for(text: str) -> None:
    task = Needle(path=text, value_bytes=1)
    batch = rows_of(task, 405, 6000)
    depth = np.bincount(batch.groups["depth"].amax(1).numpy(), minlength=10)
    assert len(depth) == 10
    assert depth.min() > 0.8 * depth.max()
    row, column = torch.nonzero(batch.targets != IGNORED, as_tuple=True)
    evidence = column - batch.groups["distance"][row, column]
    order = ((batch.ids == 0xF5) & (torch.arange(405) < evidence[:, None])).sum(1) - 1
    assert np.bincount(order.numpy(), minlength=4) / 6000 == pytest.approx([0.25] * 4, abs=0.03)


def test_text_goes_on_between_records_and_begins_anywhere(text: str) -> None:
    task = Needle(path=text, keys=1)
    assert not (task.text >= 0xF5).any()
    whole = task.text.tobytes()
    starts = []
    for row in rows_of(task, 128, 400).ids.tolist():
        at = row.index(0xF5)
        assert bytes(row[:at]) in whole
        assert bytes(row[at + 5 : -5]) in whole
        if at > 20:
            starts.append(whole.index(bytes(row[:at])) / len(whole))
    assert np.histogram(starts, bins=4, range=(0, 1))[0].min() > 50


def test_trivial_rules_are_right_for_one_record_in_four(text: str) -> None:
    task = Needle(path=text, test_examples=3000)
    found = task.baselines(128)
    assert list(found) == ["last value", "first value", "commonest byte"]
    assert list(found.values()) == pytest.approx([0.25 + 0.75 / 64] * 3, abs=0.03)
    assert task.chance(128) == 1 / 64


@pytest.mark.parametrize("values", [1, 2])
def test_answers_that_were_said_leave_fewer_for_the_next(text: str, values: int) -> None:
    task = Needle(path=text, queries=4, values=values, value_bytes=2)
    batch = rows_of(task, 160, 2000)
    hidden = batch._replace(targets=torch.zeros_like(batch.targets))
    right = (task.guesses(hidden)["value not yet said"] == batch.targets)[batch.targets >= 0].view(2000, -1, 2)
    share = right.double().mean((0, 2))
    assert share[-1] == 1
    if values == 1:
        assert share.tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1], abs=0.05)


def test_splits_never_meet_and_rows_are_a_function_of_their_key(text: str) -> None:
    task = Needle(path=text, keys=1, key_bytes=1, value_bytes=1, alphabet=3, test=[50], test_examples=30)
    sets = task.evaluation_sets(30, 7)
    assert list(sets) == ["validation", "test", "length_50"]
    seen = [{tuple(row) for b in sets[name] for row in b.ids.tolist()} for name in ("validation", "test")]
    trained = {tuple(row) for seed in (0, 1) for row in next(task.train_batches(300, 7, seed)).ids.tolist()}
    assert not seen[0] & seen[1]
    assert not trained & (seen[0] | seen[1])
    one, again, other = (next(task.train_batches(8, 64, seed)).ids for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_other_text_is_another_data_set(text: str, tmp_path: Path) -> None:
    changed = tmp_path / "changed.txt"
    changed.write_bytes(Path(text).read_bytes()[:-5] + b"else.")
    about, other = Needle(path=text).describe(128), Needle(path=str(changed)).describe(128)
    assert about["digest"] != other["digest"]
    assert about == Needle(path=text).describe(128)


def test_the_default_text_is_python_source() -> None:
    task = Needle(max_bytes=50_000)
    task.check(64)
    assert b"def " in task.text.tobytes()
    assert 10_000 < len(task.text) <= 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 5}, "queries must be at most keys, got 5 of 4"),
        ({"keys": 8, "key_bytes": 1, "alphabet": 7}, "since each differs from one in one byte, got 8 for 1 of 7"),
        ({"alphabet": 246}, "alphabet must be at most 245, got 246"),
        ({"path": "/no/such/file"}, "task.path must be an existing file or folder, got '/no/such/file'"),
    ],
)
def test_options_outside_their_rule_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Needle(**options).check(64)


def test_rows_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"needle: seq_len must be at least 25, .* got 24"):
        Needle(path=text).check(24)
    with pytest.raises(ValueError, match=r"task.path must hold at least 1000000 bytes of text, a row, got"):
        Needle(path=text).check(1_000_000)
