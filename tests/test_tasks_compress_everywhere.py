"""Every task over documents shortens them on demand: whole documents decide what is left, rows and labels stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention_zoo.tasks.public.enwik8 import Enwik8
from attention_zoo.tasks.public.labelled import Labelled
from attention_zoo.tasks.public.lra_retrieval import LraRetrieval
from attention_zoo.tasks.public.lra_text import LraText
from attention_zoo.tasks.public.pg19 import Pg19
from attention_zoo.tasks.public.text8 import Text8
from attention_zoo.tasks.public.wikitext103 import WikiText103
from attention_zoo.tasks.quote import SEPARATOR, Quote
from attention_zoo.tasks.task import Batch

HEAD = {"method": "head", "budget": 20}
ENDS = {"method": "head_tail", "budget": 20}


def ends(raw: bytes) -> bytes:
    return raw if len(raw) <= 20 else raw[:10] + raw[-10:]


def read(batch: Batch) -> list[bytes | list[int]]:
    valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.tokens is None else batch.tokens.valid
    return [ids[keep].tolist() for ids, keep in zip(batch.ids, valid, strict=True)]


def all_of(task: Labelled, length: int) -> tuple[list[list[int]], list[int], int]:
    batch = task.batch(task.parts["test"], range(len(task.parts["test"].labels)), length)
    return read(batch), batch.targets.tolist(), batch.ids.shape[1]


def test_reviews(tmp_path: Path) -> None:
    texts = {}
    for split in ("train", "test"):
        for folder in ("neg", "pos"):
            (tmp_path / split / folder).mkdir(parents=True)
            for index in range(6):
                texts[split, folder, index] = f"{split} {folder} {index}:".encode() + b"word " * index + b"END"
                (tmp_path / split / folder / f"{index}.txt").write_bytes(texts[split, folder, index])
    raws = [texts["test", folder, index] for folder in ("neg", "pos") for index in range(6)]
    whole, task = LraText(path=str(tmp_path)), LraText(path=str(tmp_path), compress=ENDS)
    found, labels, width = all_of(task, 40)
    assert [bytes(ids) for ids in found] == [ends(raw) for raw in raws]
    assert width == 20, "what is left is what is paid for"
    assert labels == all_of(whole, 40)[1]
    assert [bytes(ids) for ids in all_of(task, 15)[0]] == [ends(raw)[:15] for raw in raws]
    short = LraText(path=str(tmp_path), compress={"method": "head", "budget": 1000})
    assert all_of(short, 40) == all_of(whole, 40), "short ones pass untouched"
    told = task.describe(40)
    every = list(texts.values())
    assert told["compress"] == {
        "method": "head_tail", "budget": 20, "documents": 24, "shortened": sum(len(raw) > 20 for raw in every),
        "kept_share": sum(map(len, map(ends, every))) / sum(map(len, every)),
    }  # fmt: skip
    assert told["digest"] == whole.describe(40)["digest"], "the same reviews are scored"
    assert "compress" not in whole.describe(40)
    assert next(task.train_batches(3, 40, seed=0)).ids.shape == (3, 20)


def test_pairs_shorten_each_text(tmp_path: Path) -> None:
    pairs = [(f"first {index} {'y' * 3 * index}E", f"other {'x' * 5 * index}E") for index in range(8)]
    for split in ("train", "eval", "test"):
        lines = [f"{index % 2}\tP\tQ\t{one}\t{two}\r\n" for index, (one, two) in enumerate(pairs)]
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_bytes("".join(lines).encode())
    whole, task = LraRetrieval(path=str(tmp_path)), LraRetrieval(path=str(tmp_path), compress=ENDS)
    found, labels, width = all_of(task, 101)
    assert found == [[*ends(one.encode()), SEPARATOR, *ends(two.encode())] for one, two in pairs]
    assert width == 41
    assert labels == all_of(whole, 101)[1] == [0, 1] * 4
    every = [len(text) for pair in pairs for text in pair] * 3
    told = task.describe(101)
    assert told["compress"]["shortened"] == sum(size > 20 for size in every)
    assert told["compress"]["documents"] == 48
    assert told["compress"]["kept_share"] == sum(min(20, size) for size in every) / sum(every)
    assert told["digest"] == whole.describe(101)["digest"]


def test_books_and_articles_are_shortened_one_by_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    books: dict[str, list[bytes]] = {split: [draw.randbytes(n) for n in (300, 15, 90)] for split in
                                     ("train", "validation", "test")}  # fmt: skip
    for split, raws in books.items():
        (tmp_path / split).mkdir()
        for index, raw in enumerate(raws):
            (tmp_path / split / f"{index}.txt").write_bytes(raw)
    whole, task = Pg19(path=str(tmp_path)), Pg19(path=str(tmp_path), compress=ENDS)
    assert [part.data.tobytes() for part in task.parts.values()] == [
        b"".join(map(ends, raws)) for raws in books.values()
    ]
    assert task.parts["train"].ends.tolist() == [20, 35, 55]
    told = task.describe(8)
    assert told["compress"] == {**ENDS, "kept_share": 55 / 405, "documents": 9, "shortened": 6}
    assert told["digest"] != whole.describe(8)["digest"], "other bytes are predicted"
    assert next(task.train_batches(2, 8, seed=0)).ids.shape == (2, 8)


def test_no_word_perplexity_of_shortened_books(tmp_path: Path) -> None:
    for split, count in (("train", 1), ("validation", 1), ("test", 100)):
        (tmp_path / split).mkdir()
        for index in range(count):
            (tmp_path / split / f"{index}.txt").write_bytes(b"a book " * 20)
    assert "word_perplexity" in Pg19(path=str(tmp_path)).score(1.0, 0.5)
    assert "word_perplexity" not in Pg19(path=str(tmp_path), compress=HEAD).score(1.0, 0.5)


def test_articles_begin_with_their_titles(tmp_path: Path) -> None:
    articles = [
        b" \n = The cat = \n \n the cat sat and sat \n \n = = Life = = \n the end \n",
        b" = Two = Three = \n \n a = b = c \n = = = Deeper = = = \n x \n",
        b" = X = \n short\n",
    ]
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.raw").write_bytes(b"".join(articles))
    whole, task = WikiText103(path=str(tmp_path)), WikiText103(path=str(tmp_path), compress=ENDS)
    assert np.array_equal(task.articles["train"], [0, len(articles[0]), len(articles[0] + articles[1])])
    assert task.parts["test"].data.tobytes() == b"".join(map(ends, articles))
    told = task.describe(8)
    assert told["compress"]["documents"] == 9
    assert told["compress"]["shortened"] == 6
    assert told["digest"] != whole.describe(8)["digest"]
    assert whole.parts["test"].ends.tolist() == [sum(map(len, articles))]
    with pytest.raises(ValueError, match=r"task.compress shortens bytes and must be null by words, got \{'method'"):
        WikiText103(path=str(tmp_path), level="words", compress=ENDS)


@pytest.mark.parametrize("kind", [Enwik8, Text8])
def test_one_text_has_no_documents(kind: type[Enwik8]) -> None:
    with pytest.raises(ValueError, match=rf"task.compress .* must be null for {kind.name}, one text"):
        kind(path=".", compress=HEAD)


def quote(**options: Any) -> Quote:
    return Quote(**{"quote": 16, "seam": 2, "background": "random", "bytes": 26, "test_examples": 300, **options})


@pytest.mark.parametrize("method", ["head", "head_tail", "chunks"])
def test_rows_of_quotes_are_the_same_with_less_of_their_documents(method: str) -> None:
    how = {"method": method, "budget": 40} | ({"chunk": 10} if method == "chunks" else {})
    whole, task = quote(), quote(compress=how)
    size = 100 - 17
    pieces = {"head": [(0, 40)], "head_tail": [(0, 20), (size - 20, size)],
              "chunks": [(0, 10), (24, 34), (48, 58), (73, 83)]}[method]  # fmt: skip
    for split in ("validation", "test"):
        for before, after in zip(*(t.evaluation_sets(100, 100)[split] for t in (whole, task)), strict=True):
            document, rest = before.ids[:, :size], before.ids[:, size:]
            assert torch.equal(after.ids, torch.cat([*(document[:, a:b] for a, b in pieces), rest], 1))
            assert torch.equal(after.targets, before.targets)
            assert torch.equal(after.groups["distance"], before.groups["distance"])
            assert torch.equal(after.types, (torch.arange(57) >= 40).long().expand(100, -1))
            assert after.tokens is None
    assert after.groups["distance"].max() > 57, "a passage that was dropped is scored"
    told = task.describe(100)
    assert told["compress"]["kept_share"] == pytest.approx(40 / 83)
    assert (told["compress"]["documents"], told["compress"]["shortened"]) == (300, 300)
    assert told["digest"] == whole.describe(100)["digest"]
    told = task.baselines(100)
    assert abs(told["bag_of_bytes"] - 0.5) < 0.1
    assert method != "head" or told["bigrams"] > 0.6, (
        "of rows as a model reads them: seams may be dropped where the passage is not"
    )


def test_a_budget_that_holds_all_changes_nothing() -> None:
    whole, task = quote(), quote(compress={"method": "head_tail", "budget": 83})
    for before, after in zip(whole.evaluation_sets(64, 100)["test"], task.evaluation_sets(64, 100)["test"]):
        assert all(torch.equal(a, b) for a, b in zip(before.tensors(), after.tensors(), strict=True))
    assert task.describe(100)["compress"]["kept_share"] == 1.0
    assert task.describe(100)["compress"]["shortened"] == 0
    assert task.baselines(100) == whole.baselines(100)


def test_sentences_of_quotes_are_padded_on_the_right() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("networkx")
    options = {"background": "text", "test_examples": 40, "quote": 32, "seam": 4, "global_quote": True}
    whole, task = Quote(**options), Quote(**options, compress={"method": "extractive", "budget": 90})  # type: ignore[arg-type]
    (before,), (after,) = (list(t.evaluation_sets(40, 260)["test"]) for t in (whole, task))
    assert after.ids.shape == (40, 123)
    assert after.tokens is not None
    valid = after.tokens.valid
    assert not valid.all()
    assert torch.equal(valid, valid.cummin(1).values), "padding is on the right"
    for row, ids in enumerate(read(after)):
        assert ids[-33:] == before.ids[row, -33:].tolist()
        at = int(valid[row].sum())
        assert after.types[row].nonzero().flatten().tolist() == list(range(at - 33, at))
    moved, own = task.guesses(after), [bytes(ids[:-33]) for ids in read(after)]
    asked = before.ids[:, -32:].tolist()
    assert moved["bag_of_bytes"].tolist() == [set(want) <= set(have) for want, have in zip(asked, own, strict=True)]


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"task.compress.method must be one of head"):
        quote(compress={"method": "tail", "budget": 3})
