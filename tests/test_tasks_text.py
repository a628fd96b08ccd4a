"""Text: a split that never moves, streams without gaps, and the same bytes in the same order after a restart."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.tasks import Text
from attention_zoo.tasks.text import cut_spans, list_files, read_files, split_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty files of any bytes; each byte pair of a file tells its place, so that a stream can be traced."""
    made = tmp_path / "texts"
    draw = random.Random(0)
    for index in range(60):
        path = made / f"part{index % 3}" / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(draw.randrange(256) for _ in range(draw.randrange(50, 900))))
    (made / ".hidden").write_text("not for reading")
    (made / "__pycache__").mkdir()
    (made / "__pycache__" / "x.txt").write_text("nor this")
    (made / "empty.txt").write_text("")
    return made


def task(folder: Path, **options) -> Text:
    return Text(path=str(folder), **{"held_out": None, "span": 3, **options})


def test_files_are_found_sorted_and_split_by_their_own_name_alone(folder: Path) -> None:
    names = [name for name, _, _ in list_files(folder)]
    assert len(names) == 60
    assert names == sorted(names)
    train, validation = split_files(read_files(folder, None, None), 0.2)
    sides = {name: "train" for name, _ in train} | {name: "validation" for name, _ in validation}
    assert 0 < len(validation) < len(train)
    assert sorted(sides) == names
    (folder / "part0" / "new.txt").write_text("more")
    read_files.cache_clear()
    train, validation = split_files(read_files(folder, None, None), 0.2)
    after = {name: "train" for name, _ in train} | {name: "validation" for name, _ in validation}
    assert {name: after[name] for name in sides} == sides


def test_digest_names_the_content(folder: Path) -> None:
    before = task(folder).describe(16)
    assert task(folder).describe(16) == before
    (folder / "part0" / "00.txt").write_bytes(b"changed" * 30)
    read_files.cache_clear()
    assert task(folder).describe(16)["digest"] != before["digest"]


def test_a_cap_takes_a_fair_sample_of_whole_files(folder: Path) -> None:
    files = read_files(folder, None, 5000)
    total = sum(len(raw) for _, raw in files)
    assert 3500 < total <= 5000
    assert {name.split("/")[0] for name, _ in files} == {"part0", "part1", "part2"}
    assert all(raw == (folder / name).read_bytes() for name, raw in files)


def test_rows_are_streams_without_gaps_inside_one_document(folder: Path) -> None:
    text = task(folder)
    batches = text.train_batches(4, 32, seed=0)
    data = text.corpora[0].data.tobytes()
    before = None
    fresh = 0
    for _ in range(40):
        batch = next(batches)
        assert batch.ids.shape == (4, 32)
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        assert all(bytes(row.tolist()) in data for row in batch.ids)
        if before is not None:
            goes_on = batch.ids[:, 0] == before.targets[:, -1]
            assert bool(goes_on[~batch.fresh].all())
            fresh += int(batch.fresh.sum())
        else:
            assert bool(batch.fresh.all())
        before = batch
    assert fresh >= 4 * 39 / 3 - 4, "a row takes a new document after at most `span` segments"


def test_an_epoch_takes_every_span_once(folder: Path) -> None:
    text = task(folder)
    batches = text.train_batches(1, 32, seed=0)
    segments = int(batches.spans.segments.sum())
    starts = []
    for _ in range(segments):
        starts.append(int(batches.at[0]) if batches.left[0] else -1)
        next(batches)
    assert batches.epoch == 0
    assert sum(start < 0 for start in starts) == len(batches.spans.start)
    next(batches)
    assert batches.epoch == 1
    second = text.train_batches(1, 32, seed=1)
    next(second)
    assert second.order.tolist() != batches.order.tolist()


@pytest.mark.parametrize("steps", [0, 1, 7, 90])
def test_resumes_anywhere(folder: Path, steps: int) -> None:
    whole = task(folder).train_batches(3, 32, seed=5)
    for _ in range(steps):
        next(whole)
    later = task(folder).train_batches(3, 32, seed=5)
    later.load_state_dict(whole.state_dict())
    for _ in range(50):
        expected, found = next(whole), next(later)
        assert torch.equal(expected.ids, found.ids)
        assert torch.equal(expected.fresh, found.fresh)


def test_short_files_are_joined_and_every_span_lies_inside_the_text() -> None:
    ends = np.cumsum([10, 10, 500, 3, 40, 100])
    spans = cut_spans(ends, seq_len=16, span=3)
    assert spans.segments.max() == 3
    assert ((spans.start + spans.segments * 16 + spans.slack) < ends[-1]).all()
    assert spans.start[0] == 0
    assert len(cut_spans(np.array([16]), 16, 3).start) == 0, "the last token needs a target"
    assert len(cut_spans(np.array([17]), 16, 3).start) == 1


def test_evaluation_sets_are_fixed_and_apart_from_training(folder: Path) -> None:
    text = task(folder, held_out="attention_zoo", evaluation_rows=5)
    sets = text.evaluation_sets(2, 32)
    assert list(sets) == ["validation", "held_out"]
    for found in sets.values():
        one, two = list(found), list(found)
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(one, two, strict=True))
        assert sum(int(batch.fresh.sum()) for batch in one) == 5
    train = text.corpora[0].data.tobytes()
    assert not any(bytes(row.tolist()) in train for batch in sets["validation"] for row in batch.ids)


def test_one_file_gives_its_end_to_validation(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(256)) * 40)
    text = Text(path=str(path), held_out=None, validation=0.25)
    train, validation = text.corpora
    assert train.data.tobytes() + validation.data.tobytes() == path.read_bytes()
    assert len(validation.data) == 2560
    text.check(64)


def test_a_small_folder_still_has_both_sides(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 100)
    train, validation = Text(path=str(tmp_path), held_out=None, validation=0.01).corpora
    assert len(train.ends) == len(validation.ends) == 1


def test_the_standard_library_is_there_and_quick_to_read() -> None:
    described = Text(max_bytes=300_000, held_out_bytes=100_000).describe(256)
    assert described["source"] == "standard library"
    assert 250_000 < described["train_bytes"] + described["validation_bytes"] <= 300_000
    assert 50_000 < described["held_out_bytes"] <= 100_000
    assert len(described["digest"]) == 16


def test_bits_per_byte_are_nats_over_log_two() -> None:
    assert Text().score(math.log(256), 0.0)["bits_per_byte"] == pytest.approx(8.0)


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"task.path must be an existing file or folder, got '{missing}'"):
        Text(path=missing)
    with pytest.raises(ValueError, match=f"task.path={tmp_path} holds no non-empty file"):
        task(tmp_path).check(16)
    (tmp_path / "a.txt").write_text("hello" * 100)
    with pytest.raises(ValueError, match=r"no non-empty file ending in \.md"):
        task(tmp_path, suffix=".md").check(16)
    with pytest.raises(ValueError, match="seq_len must be smaller than a document, got 5000"):
        task(tmp_path, suffix=".txt").check(5000)
    with pytest.raises(ValueError, match=r"task.held_out must name an installed package .* got 'no_such_package'"):
        Text(held_out="no_such_package")
    with pytest.raises(ValueError, match="validation must be a share between 0 and 1, got 1"):
        Text(validation=1)


def test_no_folder_of_ones_own_is_left_out_unasked(tmp_path: Path) -> None:
    for name in ("train", "valid", "test", "tests", "node_modules", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"what {name} holds " * 20)
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "text.txt").write_text("hidden " * 20)

    def taken(**options) -> int:
        found = task(tmp_path, **options).describe(16)
        return found["train_files"] + found["validation_files"]

    assert taken() == 6
    assert taken(skip=["test", "tests"]) == 4
    assert taken(hidden=True) == 7
    assert Text(path=None).skip == tuple(sorted(Text(held_out=None).skip)), "the standard library keeps its own rule"
    assert "tests" in Text().skip


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(3 * 2**30)  # a hole: takes no room on the disk, and would take 3 GiB read whole
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: pytest.fail("reads all of it"))
        assert [len(raw) for _, raw in read_files(large, None, 1000)] == [1000]
        assert [len(raw) for _, raw in read_files(tmp_path, None, 1000)] == [1000]


def test_text_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 50)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"task.path: .*gone.txt cannot be read: No such file or directory"):
        task(tmp_path).check(16)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.txt").unlink()
    task(tmp_path, validation=0.5).check(16)  # a pipe in a folder is no file
    for path in (str(tmp_path / "pipe"), "/dev/zero", "x" * 5000, "~nobody-by-this-name/x", "nul\x00", ""):
        with pytest.raises(ValueError, match=r"task.path must be an existing file or folder, got") as caught:
            Text(path=path)
        assert "\n" not in str(caught.value)
