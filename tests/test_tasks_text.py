"""Text: a split that never moves, streams without gaps, and the same bytes in the same order after a restart."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.jobs.trainings import share
from attention_zoo.tasks import Text, ngrams, repeats
from attention_zoo.tasks.documents import SHARED
from attention_zoo.tasks.ngrams import bits_per_byte
from attention_zoo.tasks.repeats import CONTEXT, SHINGLE, known_share, recall_distance, shingles
from attention_zoo.tasks.text import cut_spans, join_files, list_files, read_files, split_files


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

    def sides() -> dict[str, int]:
        return {name: part for part, files in enumerate(split_files(read_files(folder, None, None), 0.2, 0.15))
                for name, _ in files}  # fmt: skip

    before = sides()
    counts = [list(before.values()).count(part) for part in range(3)]
    assert counts[0] > 30
    assert min(counts[1:]) > 3
    assert sorted(before) == names
    (folder / "part0" / "new.txt").write_text("more")
    after = sides()
    assert {name: after[name] for name in before} == before


def test_digest_names_the_content(folder: Path) -> None:
    before = task(folder).describe(16)
    assert task(folder).describe(16) == before
    (folder / "part0" / "00.txt").write_bytes(b"changed" * 30)
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
    data = text.corpora["train"].data.tobytes()
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
    assert list(sets) == ["validation", "test", "held_out"]
    for found in sets.values():
        one, two = list(found), list(found)
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(one, two, strict=True))
        assert sum(int(batch.fresh.sum()) for batch in one) == 5
    train = text.corpora["train"].data.tobytes()
    for name in ("validation", "test"):
        assert not any(bytes(row.tolist()) in train for batch in sets[name] for row in batch.ids)


def test_every_document_is_evaluated_unless_rows_are_picked(folder: Path) -> None:
    text = task(folder, test=0.3)
    data = text.corpora["test"].data.tobytes()
    spans = cut_spans(text.corpora["test"].ends, 32, 3)
    assert len(set(spans.segments.tolist())) > 1, "spans of unlike lengths are among them"
    rows = [row for batch in text.evaluation_sets(4, 32)["test"] for row in batch.ids]
    assert len(rows) == spans.segments.sum()
    assert all(bytes(row.tolist()) in data for row in rows)
    batches = list(task(folder, test=0.3, evaluation_rows=3).evaluation_sets(2, 32)["test"])
    assert sum(int(batch.fresh.sum()) for batch in batches) == 3


def test_rows_of_one_token_take_few_calls(folder: Path) -> None:
    text = task(folder, test=0.3)
    sets = text.evaluation_sets(2, 1)
    scored = [row for batch in sets["test"] for row in batch.targets.flatten().tolist()]
    assert len(scored) == cut_spans(text.corpora["test"].ends, 1, 3).segments.sum()
    assert len(list(sets["test"])) < 3 * 4, "at least 1,024 tokens each, but at the end"
    assert next(iter(text.evaluation_sets(2, 600)["validation"])).ids.shape[0] <= 2


def test_one_file_gives_its_end_to_validation(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(256)) * 40)
    text = Text(path=str(path), held_out=None, validation=0.25, test=0.125)
    assert list(text.corpora) == ["train", "validation", "test"]
    assert b"".join(part.data.tobytes() for part in text.corpora.values()) == path.read_bytes()
    assert [len(part.data) for part in text.corpora.values()] == [6400, 2560, 1280]
    text.check(64)


def test_a_small_folder_still_has_both_sides(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 100)
    three = Text(path=str(tmp_path), held_out=None, validation=0.01).corpora
    assert [len(part.ends) for part in three.values()] == [2, 2, 2], "fewer files than parts: each is cut"
    two = Text(path=str(tmp_path), held_out=None, validation=0.01, test=0, duplicates=1).corpora
    assert [len(part.ends) for part in two.values()] == [1, 1]
    (tmp_path / "c.txt").write_text("something else " * 20)
    three = Text(path=str(tmp_path), held_out=None, validation=0.01).corpora
    assert [len(part.ends) for part in three.values()] == [1, 1, 1]


def test_shares_must_leave_a_rest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation and test must leave a share for training, got 0.5 and 0.5"):
        Text(path=str(tmp_path), validation=0.5, test=0.5)


def test_the_standard_library_is_there_and_quick_to_read() -> None:
    described = Text(max_bytes=300_000, held_out_bytes=100_000).describe(256)
    assert described["source"] == "standard library"
    read = sum(described[name] for name in ("train_bytes", "validation_bytes", "test_bytes", "dropped_bytes"))
    assert 250_000 < read <= 400_000
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
        return found["train_files"] + found["validation_files"] + found["test_files"]

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


def test_shingles_are_equal_where_the_strings_are() -> None:
    draw = random.Random(1)
    data = bytes(draw.choice(b"ab") for _ in range(600))
    found = shingles(np.frombuffer(data, np.uint8), 7)
    strings = [data[i : i + 7] for i in range(len(data) - 6)]
    assert len(found) == len(strings)
    assert len(set(found.tolist())) == len(set(strings))
    assert len({(h, s) for h, s in zip(found.tolist(), strings)}) == len(set(strings))
    assert len(shingles(np.zeros(6, np.uint8), 7)) == 0


def test_documents_that_repeat_training_are_not_evaluated(folder: Path) -> None:
    plain = task(folder, test=0.2).documents
    assert plain.dropped == []
    train = plain.parts["train"]
    target, other = plain.parts["test"][0][0], plain.parts["validation"][0][0]
    longest = max(train, key=lambda entry: len(entry[1]))[1]
    (folder / target).write_bytes(b"new words. " * 3 + longest)
    (folder / other).write_bytes(bytes(range(256)) * 8 + longest[: SHINGLE + 5])  # about 6 of its 256 shingles: below
    text = task(folder, test=0.2)
    assert [name for name, _ in plain.parts["test"][1:]] == [name for name, _ in text.documents.parts["test"]]
    assert other in {name for name, _ in text.documents.parts["validation"]}
    described = text.describe(16)
    assert (described["dropped_files"], described["dropped_bytes"]) == (1, 33 + len(longest))
    assert target in {name for name, _ in task(folder, test=0.2, duplicates=1).documents.parts["test"]}


def test_the_share_that_is_known_is_counted_within_files(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    one, two = (bytes(draw.randrange(256) for _ in range(300)) for _ in range(2))
    seen = (("a", one[:200]), ("b", two))
    shares = known_share((("x", one), ("y", two[50:]), ("z", b"short"), ("w", one[150:] + two[:49])), seen)
    expected = []
    for raw in (one, two[50:], b"short", one[150:] + two[:49]):
        strings = {raw[i : i + SHINGLE] for i in range(len(raw) - SHINGLE + 1)}
        expected.append(sum(any(s in text for _, text in seen) for s in strings) / max(1, len(strings)))
    assert shares.tolist() == pytest.approx(expected)
    monkeypatch.setattr(repeats, "MOST", 100)
    sampled = known_share((("x", one), ("y", two[50:]), ("z", b"short")), seen)
    assert sampled.tolist() == pytest.approx([expected[0], 1, 0], abs=0.15), "from a fifth of the shingles"


def test_a_part_of_repeats_alone_is_drawn_larger(tmp_path: Path) -> None:
    draw = random.Random(5)
    for index in range(30):
        (tmp_path / f"{index}.txt").write_bytes(bytes(draw.randrange(256) for _ in range(300)))
    first = task(tmp_path, validation=0.01, test=0).documents.parts
    ((name, _),) = first["validation"]
    (tmp_path / name).write_bytes(first["train"][0][1])
    found = task(tmp_path, validation=0.01, test=0)
    names = {part: {name for name, _ in files} for part, files in found.documents.parts.items()}
    assert 1 <= len(names["validation"]) <= 8
    assert name not in names["validation"]
    assert not names["validation"] & names["train"]
    assert len(names["train"]) + len(names["validation"]) + found.describe(16)["dropped_files"] == 30


def test_nothing_left_to_evaluate_is_said(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}.txt").write_text("the same words again and again. " * 20)
    with pytest.raises(ValueError, match=r"task.duplicates must leave a document for validation, got 0.05"):
        task(tmp_path).check(16)
    (tmp_path / "byte").mkdir()
    (tmp_path / "byte" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"task.path=.* must hold bytes for each of training, validation, test, got 1"):
        task(tmp_path / "byte").check(16)
    task(tmp_path, duplicates=1).check(16)


def test_recall_is_the_distance_to_the_latest_time_over_the_whole_row(tmp_path: Path) -> None:
    draw = random.Random(3)
    row = bytes(draw.choice(b"ab") for _ in range(400))
    found = recall_distance(np.frombuffer(row + row[::-1], np.uint8).reshape(2, 400))
    for line, distances in zip((row, row[::-1]), found):
        for at in range(400):
            string = line[at - CONTEXT : at + 1]
            back = [d for d in range(1, at - CONTEXT + 1) if string == line[at - CONTEXT - d : at + 1 - d]]
            assert distances[at] == (min(back) if back else -1)
    (tmp_path / "a.txt").write_bytes(bytes(draw.randrange(256) for _ in range(60)) * 50)
    text = task(tmp_path)
    batches = list(text.evaluation_sets(2, 32)["test"])
    assert all(batch.groups["recall"].shape == batch.targets.shape for batch in batches)
    farthest = [int(batch.groups["recall"].max()) for batch in batches]
    assert farthest[:3] == [-1, -1, 60], "what stood in an earlier segment counts: byte 68 is the first to come again"
    assert next(text.train_batches(2, 32, 0)).groups == {}


def test_n_grams_are_smoothed_as_witten_and_bell_say() -> None:
    draw = random.Random(4)
    train, other = (bytes(draw.choice(b"aab c") for _ in range(size)) for size in (300, 80))
    other += b"xa"

    def chance(context: bytes, byte: int) -> float:
        lower = chance(context[1:], byte) if context else 1 / 256
        n = len(context)
        after = [train[i + n] for i in range(len(train) - n) if train[i : i + n] == context]
        return (after.count(byte) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower

    places = np.arange(1, len(other))
    found = bits_per_byte(join_files([("a", train)]), np.frombuffer(other, np.uint8), places)
    for name, order in (("unigram", 0), ("order-3 n-gram", 3)):
        expected = np.mean([-math.log2(chance(other[max(0, i - order) : i], other[i])) for i in places])
        assert found[name] == pytest.approx(expected)
    assert sum(chance(b"aab", byte) for byte in range(256)) == pytest.approx(1)


def test_the_bar_is_below_chance_on_text_and_not_on_noise(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    text = task(tmp_path / "a.txt")
    assert text.baselines(32)["order-3 n-gram"] < 0.5 < 3 < text.baselines(32)["unigram"] < text.chance(32) == 8
    assert task(folder).baselines(32)["order-3 n-gram"] > 7.5


def test_what_runs_share_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By who starts them: a run then neither counts strings nor looks for repeats."""
    given = {"config": {"task": {"_target_": "attention_zoo.tasks.Text", "path": str(folder), "held_out": None}}}
    known_share.cache_clear()
    monkeypatch.setattr(ngrams, "_counted", {})
    made = Text(path=str(folder), held_out=None)
    expected = made.baselines(8)
    known_share.cache_clear()
    ngrams._counted.clear()
    share(given)
    looked = known_share.cache_info().misses
    assert looked
    share(given)
    monkeypatch.setattr(ngrams, "_table", lambda *_: pytest.fail("counted again"))
    anew = Text(path=str(folder), held_out=None)
    assert anew.baselines(8) == expected
    assert known_share.cache_info().misses == looked
    assert anew.describe(8) == made.describe(8)


def test_neither_much_text_nor_other_peoples_tasks_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "corpora", property(lambda self: pytest.fail("read")))
    Text(max_bytes=None).share()
    Text(max_bytes=SHARED + 1).share()
    share({"config": {"task": {"_target_": "tests.nowhere.Task"}}})
