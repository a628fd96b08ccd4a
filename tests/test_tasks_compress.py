"""Compression: whole ranges in order, never more than the budget, and what is short passes untouched."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_zoo.tasks import Text
from attention_zoo.tasks.compress import METHODS, compressed, compression, ranges, sentences, shortened

DRAWN = [method for method in METHODS if method != "extractive"]
STORY = b"""The lighthouse keeper lit the lamp each night. Ships at sea watched the lamp of the lighthouse.
Bread was cheap. One night the lamp of the lighthouse failed, and the keeper climbed to the lamp!
Cats sleep a lot. Did the ships see the lighthouse? 7
"""


def need_extra() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("networkx")


@given(st.binary(max_size=400), st.integers(1, 450), st.sampled_from(DRAWN), st.integers(1, 90))
def test_ranges_are_in_order_and_fill_the_budget(raw: bytes, budget: int, method: str, chunk: int) -> None:
    found = ranges(raw, compression(method=method, budget=budget, chunk=chunk if method == "chunks" else None))
    edges = [edge for piece in found for edge in piece]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= len(raw)
    assert sum(stop - start for start, stop in found) == min(budget, len(raw))
    assert shortened(raw, compression(method=method, budget=max(1, len(raw)))) == raw


def test_what_each_keeps() -> None:
    raw = bytes(range(100))

    def of(method: str, budget: int, **options: int) -> list[tuple[int, int]]:
        return ranges(raw, compression(method=method, budget=budget, **options))

    assert of("head", 30) == [(0, 30)]
    assert of("head_tail", 31) == [(0, 15), (84, 100)]
    assert of("head_tail", 1) == [(0, 1)]
    assert of("chunks", 30, chunk=10) == [(0, 10), (45, 55), (90, 100)]
    assert of("chunks", 8, chunk=10) == [(0, 8)]
    assert shortened(raw, compression(method="head_tail", budget=4)) == bytes([0, 1, 98, 99])


@pytest.mark.parametrize(
    "raw", [STORY, b"", b"no end", b"\n\n", b"a.b(c) is one.\n  def f():\n\n    pass", b"? ! . \n."]
)
def test_sentences_add_up_to_the_whole(raw: bytes) -> None:
    found = sentences(raw)
    assert b"".join(raw[start:stop] for start, stop in found) == raw
    assert all(start < stop for start, stop in found)
    if raw == STORY:
        assert [raw[start:stop].split()[0] for start, stop in found] == [
            b"The", b"Ships", b"Bread", b"One", b"Cats", b"Did", b"7",
        ]  # fmt: skip


def test_the_most_central_sentences_are_taken() -> None:
    need_extra()
    central = [STORY[start:stop] for start, stop in sentences(STORY) if STORY[start:stop].count(b"lamp")]
    whole = b"".join(central)
    assert len(central) == 3
    assert shortened(STORY, compression(method="extractive", budget=len(whole))) == whole


def test_sentences_that_are_ranked_are_whole_unless_none_fits() -> None:
    need_extra()
    draw = random.Random(0)
    words = ["".join(draw.choice("abcde") for _ in range(4)) for _ in range(30)]
    raw = "".join(" ".join(draw.choices(words, k=draw.randrange(3, 9))) + ". " for _ in range(700)).encode()
    pieces = set(sentences(raw))
    found = ranges(raw, compression(method="extractive", budget=1000))
    assert set(found) <= pieces
    assert found == sorted(found)
    assert 950 < sum(stop - start for start, stop in found) <= 1000
    assert ranges(raw, compression(method="extractive", budget=1000)) == found
    assert [stop - start for start, stop in ranges(raw, compression(method="extractive", budget=2))] == [2]
    assert len(shortened(b"... \n" * 50, compression(method="extractive", budget=20))) == 20, "not one word"


def test_documents_say_what_was_kept(tmp_path: Path) -> None:
    documents = [("long", b"x" * 300), ("short", b"y" * 50)]
    found, kept = compressed(documents, compression(method="head", budget=100))
    assert found == [("long", b"x" * 100), ("short", b"y" * 50)]
    assert kept == (350, 150)
    assert kept.share == pytest.approx(150 / 350)
    draw = random.Random(0)
    for index in range(12):
        (tmp_path / f"{index}.txt").write_bytes(bytes(draw.randrange(256) for _ in range(400)))
    text = Text(path=str(tmp_path), held_out=None, compress={"method": "head_tail", "budget": 100})
    described = text.describe(16)
    assert described["kept_share"] == 0.25
    assert described["train_bytes"] + described["validation_bytes"] + described["test_bytes"] == 1200
    assert described["digest"] != Text(path=str(tmp_path), held_out=None).describe(16)["digest"]
    assert "kept_share" not in Text(path=str(tmp_path), held_out=None).describe(16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tail", "budget": 10}, r"task.compress.method must be one of head, .*, got 'tail'"),
        ({"method": "head", "budget": 0}, r"task.compress.budget must be an integer of at least 1, got 0"),
        ({"method": "head"}, r"task.compress.budget must be given"),
        ({"method": "head", "budget": 5, "chunks": 2}, r"task.compress.chunks is no option of .*did you mean"),
        ({"method": "head", "budget": 5, "chunk": 2}, "task.compress.chunk belongs to method=chunks .* got 2 for head"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Text(compress=options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else there(name))
    with pytest.raises(ValueError, match=r"extractive needs sklearn, .*: pip install 'attention-zoo\[text\]'"):
        compression(method="extractive", budget=10)
    assert compression(method="chunks", budget=10).chunk == 64
