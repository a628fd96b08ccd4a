"""enwik8, text8, WikiText-103 and PG-19: published splits, files of the right form only, and nothing read whole."""

from __future__ import annotations

import hashlib
import math
import random
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.tasks import Text
from attention_zoo.tasks.public import enwik8, sums
from attention_zoo.tasks.public.enwik8 import Enwik8
from attention_zoo.tasks.public.pg19 import Pg19
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import Joined
from attention_zoo.tasks.public.text8 import Text8
from attention_zoo.tasks.public.wikitext103 import WikiText103

SPLIT = [3000, 500, 400]


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "enwik8"
    path.write_bytes(some_bytes(sum(SPLIT)))
    return path


@pytest.fixture
def books(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        (tmp_path / split).mkdir()
        for index in range(count):
            name = f"{split}/{index}.txt"
            (tmp_path / name).write_bytes(some_bytes(120 + 40 * index, seed=10 * count + index))
    return tmp_path


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    (tmp_path / "wiki.train.tokens").write_text(" \n = The cat = \n the cat and the <unk> sat é \n" * 20)
    (tmp_path / "wiki.valid.tokens").write_text(" = The dog = \n the dog \n" * 20)
    (tmp_path / "wiki.test.tokens").write_text(" the cat sat \n" * 20)
    return tmp_path


def test_enwik8_is_split_in_its_own_order(wiki: Path) -> None:
    task = Enwik8(path=str(wiki), split=SPLIT)
    raw = wiki.read_bytes()
    assert [part.data.tobytes() for part in task.parts.values()] == [raw[:3000], raw[3000:3500], raw[3500:]]
    assert list(task.parts) == ["train", "validation", "test"]
    assert isinstance(task.data, np.memmap), "no copy of the file"
    batch = next(task.train_batches(4, 32, seed=0))
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert all(bytes(row.tolist()) in raw[:3000] for row in batch.ids)
    sets = task.evaluation_sets(2, 32)
    assert list(sets) == ["validation", "test"]
    for found, part in ((sets["validation"], raw[3000:3500]), (sets["test"], raw[3500:])):
        assert all(bytes(row.tolist()) in part for rows in found for row in rows.ids)


def test_the_published_file_is_known_by_size_and_checksum(wiki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"enwik8: .*/enwik8: the file must have 100000000 bytes.* got 3900"):
        Enwik8(path=str(wiki)).check(32)
    task = Enwik8(path=str(wiki), split=SPLIT)
    told = task.describe(32)
    assert told["published"] is False
    assert told["sha256"] == hashlib.sha256(wiki.read_bytes()).hexdigest()
    assert told["files"] == {"enwik8": {"bytes": 3900, "sha256": told["sha256"]}}
    monkeypatch.setattr(Enwik8, "md5", hashlib.md5(wiki.read_bytes()).hexdigest())
    assert task.describe(32)["published"] is True
    assert sum(enwik8.PUBLISHED) == 100_000_000
    assert told["digest"] != Enwik8(path=str(wiki), split=[3100, 400, 400]).describe(32)["digest"]


def test_an_archive_holds_the_same_text(wiki: Path) -> None:
    plain = Enwik8(path=str(wiki), split=SPLIT)
    with zipfile.ZipFile(wiki.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(wiki, "enwik8")
    packed = Enwik8(path=str(wiki.with_suffix(".zip")), split=SPLIT)
    assert packed.data.tobytes() == plain.data.tobytes()
    assert packed.describe(32)["digest"] == plain.describe(32)["digest"]
    wiki.unlink()
    assert Enwik8(path=str(wiki.parent), split=SPLIT).path == wiki.with_suffix(".zip"), "a folder will do"


def test_archives_that_will_not_do_are_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", bytes(10**6))  # deflates to a thousandth
    with pytest.raises(ValueError, match=r"must have 3900 bytes.* got 1000000"):
        Enwik8(path=str(path), split=SPLIT).check(32)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", b"more")
    with pytest.raises(ValueError, match=r"the archive must hold enwik8 alone, got \['enwik8', 'more'\]"):
        Enwik8(path=str(path), split=SPLIT).check(32)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", some_bytes(3900))
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"enwik8.zip cannot be unpacked: Bad CRC-32"):
        Enwik8(path=str(path), split=SPLIT).check(32)
    path.write_bytes(raw[:2000])
    with pytest.raises(ValueError, match=r"enwik8.zip cannot be unpacked: File is not a zip file"):
        Enwik8(path=str(path), split=SPLIT).check(32)


def test_text8_holds_letters_and_spaces_alone(tmp_path: Path) -> None:
    path = tmp_path / "text8"
    path.write_bytes(b" anarchism originated" * 100)
    task = Text8(path=str(path), split=[1500, 300, 300])
    task.check(32)
    assert task.name == "text8"
    path.write_bytes(b" anarchism originated" * 99 + b" anarchism 0riginated")
    with pytest.raises(ValueError, match=r"text8, byte 2090: every byte must be a letter a to z or a space, got b'0'"):
        Text8(path=str(path), split=[1500, 300, 300]).check(32)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    for task, part, origin in (
        (Enwik8, "enwik8", "http://mattmahoney.net/dc/enwik8.zip"),
        (Text8, "text8", "http://mattmahoney.net/dc/text8.zip"),
        (WikiText103, "wiki.train.raw", "wikitext-103-v1.zip"),
        (Pg19, "train", "deepmind-gutenberg"),
    ):
        with pytest.raises(ValueError, match=rf"task.path must say where the data of {task.name} lie.*{origin}"):
            task()
        with pytest.raises(ValueError, match=rf"task.path of {task.name} must be an existing .*{origin}"):
            task(path=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match=rf"{task.name}: {tmp_path}/{part}.* is missing from the data: .*{origin}"):
            task(path=str(tmp_path)).check(32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": [10, 10]}, r"split must list bytes for training, validation and test, got \[10, 10\]"),
        ({"split": [10, 10, -1]}, "split must be"),
        ({"span": 0}, "span must be an integer of at least 1, got 0"),
    ],
)
def test_options_outside_their_rule_are_refused(wiki: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Enwik8(path=str(wiki), **options)


def test_a_row_longer_than_the_text_is_refused(wiki: Path) -> None:
    with pytest.raises(
        ValueError, match="seq_len must be smaller than the text, got 400: enwik8 has 400 tokens for te"
    ):
        Enwik8(path=str(wiki), split=SPLIT).check(400)


def test_streams_go_on_after_a_restart(wiki: Path) -> None:
    task = Enwik8(path=str(wiki), split=SPLIT)
    whole, later = task.train_batches(3, 32, seed=5), task.train_batches(3, 32, seed=5)
    for _ in range(20):
        next(whole)
    later.load_state_dict(whole.state_dict())
    assert all(torch.equal(next(whole).ids, next(later).ids) for _ in range(30))
    other = next(task.train_batches(3, 32, seed=6)).ids
    assert not torch.equal(next(task.train_batches(3, 32, seed=5)).ids, other)


def test_all_of_the_test_text_is_scored_if_asked_for(wiki: Path) -> None:
    task = Enwik8(path=str(wiki), split=SPLIT, evaluation_rows=None, span=2)
    targets = torch.cat([rows.targets.flatten() for rows in task.evaluation_sets(3, 33)["test"]])
    assert sorted(bytes(targets.tolist())) == sorted(wiki.read_bytes()[3501:][: len(targets)])
    assert len(targets) == 12 * 33


def test_a_file_is_hashed_once_as_long_as_it_stays(wiki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("x", "a file", "somewhere")
    first = sums.checksum(wiki, source)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert sums.checksum(wiki, source) == first
    wiki.write_bytes(b"other")
    assert sums.checksum(wiki, source) == hashlib.sha256(b"other").hexdigest()
    wiki.unlink()
    with pytest.raises(ValueError, match=r"x: .*enwik8 cannot be read: No such file"):
        sums.checksum(wiki, source)


def test_files_are_joined_without_being_read(books: Path) -> None:
    paths = sorted((books / "train").iterdir())
    joined = Joined([(path, path.stat().st_size) for path in paths], Source("x", "files", "somewhere"))
    raw = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    assert len(joined) == len(raw)
    at = np.random.default_rng(0).integers(0, len(raw), (50, 7))
    assert np.array_equal(joined[at], raw[at])
    assert np.array_equal(joined[np.arange(len(raw))], raw)


def test_pg19_keeps_its_folders_apart_and_its_books_whole(books: Path) -> None:
    task = Pg19(path=str(books))
    task.check(32)
    texts = {split: b"".join(p.read_bytes() for p in sorted((books / split).iterdir())) for split in task.parts}
    for batch in (next(task.train_batches(4, 32, seed=0)) for _ in range(5)):
        assert all(bytes(row.tolist()) in texts["train"] for row in batch.ids)
    for split, found in task.evaluation_sets(4, 32).items():
        assert all(bytes(row.tolist()) in texts[split] for batch in found for row in batch.ids)
    assert task.parts["train"].ends.tolist() == np.cumsum([120, 160, 200, 240, 280, 320]).tolist()


def test_pg19_tells_what_it_read(books: Path) -> None:
    (books / "metadata.csv").write_text("0,A book,1900,http://x\n")
    told = Pg19(path=str(books)).describe(32)
    listing = "".join(
        f"{hashlib.sha256((books / 'test' / name).read_bytes()).hexdigest()}  {name}\n" for name in ("0.txt", "1.txt")
    )
    expected = {"files": 2, "bytes": 280, "sha256": hashlib.sha256(listing.encode()).hexdigest()}
    assert told["test"] == expected, "what sha256sum *.txt | sha256sum prints"
    assert told["metadata.csv"]["bytes"] == 23
    fewer = Pg19(path=str(books), train_bytes=500)
    assert 0 < fewer.describe(32)["train"]["bytes"] <= 500
    assert fewer.describe(32)["test"] == told["test"]
    assert fewer.describe(32)["digest"] != told["digest"]


def test_pg19_word_perplexity_spreads_the_loss_over_published_words(
    books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "word_perplexity" not in Pg19(path=str(books)).score(1.0, 0.5), "not of a part of the test books"
    monkeypatch.setattr("attention_zoo.tasks.public.pg19.TEST_BOOKS", 2)
    monkeypatch.setattr("attention_zoo.tasks.public.pg19.TEST_WORDS", 56)
    assert Pg19(path=str(books)).score(0.5, 0.5)["word_perplexity"] == pytest.approx(math.exp(0.5 * 280 / 56))
    assert Pg19(path=str(books)).score(0.5, 0.5)["bits_per_byte"] == pytest.approx(0.5 / math.log(2))


def test_wikitext_by_bytes(articles: Path) -> None:
    task = WikiText103(path=str(articles))
    assert (task.vocab, task.metric) == (256, "bits_per_byte")
    assert task.parts["test"].data.tobytes() == (articles / "wiki.test.tokens").read_bytes()
    for name in ("train", "valid", "test"):
        (articles / f"wiki.{name}.raw").write_text(f"raw {name} " * 30)
    assert WikiText103(path=str(articles)).parts["test"].data.tobytes()[:8] == b"raw test", ".raw is for bytes"


def test_wikitext_by_words_has_the_vocabulary_of_training(articles: Path) -> None:
    task = WikiText103(path=str(articles), level="words")
    words = (articles / "wiki.train.tokens").read_text().replace("\n", "<eos>").split()
    assert list(task.numbers)[:4] == ["<eos>", "=", "cat", "the"], "equals as they come"
    counts = [words.count(word) for word in task.numbers]
    assert counts == sorted(counts, reverse=True)
    assert set(task.numbers) == set(words)
    assert (task.vocab, task.metric) == (len(set(words)), "perplexity")
    names = list(task.numbers)
    assert [names[i] for i in task.parts["train"].data] == words
    seen = [names[i] for i in task.parts["validation"].data[:8]]
    assert seen == ["=", "The", "<unk>", "=", "<eos>", "the", "<unk>", "<eos>"], "no dog is in training"
    assert task.score(math.log(50), 0.1)["perplexity"] == pytest.approx(50)
    batch = next(task.train_batches(2, 16, seed=0))
    assert int(batch.ids.max()) < task.vocab
    assert task.describe(16)["digest"] != WikiText103(path=str(articles)).describe(16)["digest"]


def test_wikitext_words_are_utf_8(articles: Path) -> None:
    (articles / "wiki.train.tokens").write_bytes(b" fine \n also fine \n not \xff fine \n")
    with pytest.raises(ValueError, match=r"wiki.train.tokens, line 3: words must be UTF-8, got b'\\xff fine"):
        WikiText103(path=str(articles), level="words")


def test_a_copy_on_the_hub_is_fetched_and_read_like_any_folder(wiki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((name, repo_type, revision))
        if name == "no/network":
            raise ConnectionError("cannot reach\nhuggingface.co")
        return str(wiki.parent)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    task = Enwik8(path="hf:someone/enwik8@v1", split=SPLIT)
    assert task.parts["train"].data.tobytes() == wiki.read_bytes()[:3000]
    Enwik8(path="hf:someone/enwik8", split=SPLIT)
    assert asked == [("someone/enwik8", "dataset", "v1"), ("someone/enwik8", "dataset", None)]
    with pytest.raises(ValueError, match=r"'hf:no/network' cannot be fetched.*ConnectionError: cannot reach hugg.*get"):
        Enwik8(path="hf:no/network", split=SPLIT)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="which takes the package huggingface_hub: pip install huggingface_hub"):
        Enwik8(path="hf:someone/enwik8", split=SPLIT)


def test_any_other_folder_is_read_as_it_is_by_the_text_task(tmp_path: Path) -> None:
    (tmp_path / "sub folder" / "é").mkdir(parents=True)
    (tmp_path / "crlf.txt").write_bytes(b"line\r\nline\r\n" * 200)
    (tmp_path / "utf16.log").write_text("wörter " * 300, encoding="utf-16")
    (tmp_path / "sub folder" / "é" / "no ending").write_bytes(bytes(range(256)) * 20)
    task = Text(path=str(tmp_path), held_out=None)
    task.check(64)
    told = task.describe(64)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(value for name, value in told.items() if name.endswith("_bytes")) == sum(sizes)
    assert next(task.train_batches(2, 64, seed=0)).ids.shape == (2, 64)
