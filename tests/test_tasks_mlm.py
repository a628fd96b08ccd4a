"""Masked text: rows hold what the text holds, masks are drawn as BERT says, the order of the halves tells the label."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.tasks import IGNORED, Batch, masked
from attention_zoo.tasks.corpus import join_files
from attention_zoo.tasks.masked import CLS, MASK, SEP, MaskedText
from attention_zoo.tasks.ngrams import two_sided

L = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of words of their own letters each, some shorter than a row, one shorter than any piece."""
    made = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for index in range(40):
        letters = [chr(97 + (index * 7 + i) % 26) for i in range(9)] + [" "]
        size = draw.randrange(300, 900) if index % 4 else draw.randrange(20, 35)
        (made / f"{index:02}.txt").write_text("".join(draw.choices(letters, k=size)))
    (made / "tiny.txt").write_text("tiny")
    return made


def task(folder: Path, **options) -> MaskedText:
    return MaskedText(path=str(folder), **{"held_out": None, "validation": 0.2, "test": 0.3, **options})


def halves(batch: Batch) -> list[tuple[bytes, ...]]:
    """The pieces of each row as they were before masks, read off ids, targets and padding alone."""
    found = []
    for ids, targets, valid in zip(batch.ids.tolist(), batch.targets.tolist(), batch.tokens.valid.tolist()):
        row = [target if target != IGNORED else token for token, target in zip(ids, targets)][: sum(valid)]
        assert valid == sorted(valid, reverse=True)
        assert (row[0], row[-1]) == (CLS, SEP)
        between = row.index(SEP)
        pieces = [row[1:between]] + ([row[between + 1 : -1]] if between < len(row) - 1 else [])
        found.append(tuple(bytes(piece) for piece in pieces))
    return found


def test_the_order_is_told_by_who_knows_the_text(folder: Path) -> None:
    text = task(folder)
    batch = text.training((0,), 400, L)
    data = [raw for _, raw in text.documents.parts["train"]]
    for (one, two), label in zip(halves(batch), batch.labels["order"].tolist()):
        assert len(one) == len(two) <= (L - 3) // 2
        if one != two:
            assert any(one + two in raw for raw in data) == (label == 0)
            assert any(two + one in raw for raw in data) == (label == 1)
    assert 0.4 < batch.labels["order"].double().mean() < 0.6
    second = (batch.ids == SEP).long().cumsum(1) - (batch.ids == SEP).long()
    assert torch.equal(batch.types[batch.tokens.valid], second[batch.tokens.valid])
    assert not batch.tokens.valid.all(), "short documents are padded"
    assert batch.types[~batch.tokens.valid].sum() == 0


def test_masks_are_drawn_as_the_paper_says(folder: Path) -> None:
    batch = task(folder).training((1,), 4000, L)
    asked = batch.targets != IGNORED
    special = (batch.ids >= CLS) & ~asked
    assert set(batch.ids[special].tolist()) == {CLS, SEP}
    text = batch.tokens.valid & ~special
    assert not asked[~text].any()
    assert int(asked.sum()) / int(text.sum()) == pytest.approx(0.15, abs=0.005)
    reads, right = batch.ids[asked], batch.targets[asked]
    assert float((reads == MASK).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((reads == right).double().mean()) == pytest.approx(0.1, abs=0.01)
    others = reads[(reads != MASK) & (reads != right)]
    assert float(len(others) / len(reads)) == pytest.approx(0.1, abs=0.01)
    assert len(others.unique()) > 240, "any byte, not those of the text alone"
    place = asked.sum(0)[text.sum(0) > 1000] / text.sum(0)[text.sum(0) > 1000]
    assert len(place) > 30
    assert float(place.max() / place.min()) < 1.5


@pytest.mark.parametrize("pair", ["order", "none"])
def test_an_evaluation_set_is_all_of_its_text_once(folder: Path, pair: str) -> None:
    text = task(folder, pair=pair)
    room = (L - 3) // 2 * 2 if pair == "order" else L - 2
    for name in ("validation", "test"):
        batches = list(text.evaluation_sets(7, L)[name])
        rows = []
        for batch in batches:
            labels = batch.labels["order"].tolist() if pair == "order" else [0] * len(batch.ids)
            rows += [b"".join(row[::-1] if label else row) for row, label in zip(halves(batch), labels)]
        expected = [raw[at : at + room] for _, raw in text.documents.parts[name] for at in range(0, len(raw), room)]
        expected = [piece[: len(piece) // 2 * 2] if pair == "order" else piece for piece in expected if len(piece) > 15]
        assert rows == expected
    again = list(text.evaluation_sets(3, L)["test"])
    assert torch.equal(torch.cat([b.ids for b in again]), torch.cat([b.ids for b in batches])), "masks are fixed"
    few = list(task(folder, pair=pair, evaluation_rows=5).evaluation_sets(3, L)["test"])
    assert [len(batch.ids) for batch in few] == [3, 2]


def test_the_next_half_is_of_another_document_and_its_length_tells_nothing(folder: Path) -> None:
    text = task(folder, pair="next")
    batch = text.training((2,), 3000, L)
    data = [raw for _, raw in text.documents.parts["train"]]
    label = batch.labels["next"].numpy()
    for (one, two), apart in list(zip(halves(batch), label))[:300]:
        assert len(one) == len(two)
        if len(one) > 8:  # shorter ones may stand in another document, too
            assert any(one + two in raw for raw in data) == (apart == 0)
            assert not apart or not any(one in raw and two in raw for raw in data)
    lengths = batch.tokens.valid.sum(1).numpy()
    assert lengths[label == 0].mean() == pytest.approx(lengths[label == 1].mean(), abs=1)


def test_rows_are_a_function_of_seed_and_step(folder: Path) -> None:
    whole = task(folder).train_batches(4, L, seed=3)
    seen = [next(whole) for _ in range(5)]
    assert not torch.equal(seen[0].ids, seen[1].ids)
    later = task(folder).train_batches(4, L, seed=3)
    later.load_state_dict({"step": 2})
    assert later.state_dict() == {"step": 2}
    for batch in seen[2:]:
        again = next(later)
        assert all(torch.equal(a, b) for a, b in zip(again.tensors(), batch.tensors(), strict=True))
    assert not torch.equal(next(task(folder).train_batches(4, L, seed=4)).ids, seen[0].ids)


def test_no_question_needs_no_label(folder: Path) -> None:
    plain = task(folder, pair="none")
    batch = plain.training((0,), 3, L)
    assert (plain.classes, batch.labels, batch.types) == (None, {}, None)
    assert plain.further_baselines(L) == {}
    assert (task(folder).classes, task(folder).objective, task(folder).vocab) == (2, "masked_lm", 259)


def test_the_two_sided_bar_reads_what_is_shown() -> None:
    draw = random.Random(1)
    train = bytes(draw.choice(b"abca ") for _ in range(400))

    def chance(text: bytes, context: bytes, byte: int) -> float:
        lower = chance(text, context[1:], byte) if context else 1 / 256
        n = len(context)
        after = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == context]
        return (after.count(byte) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower

    a, b, c, space = b"abc "
    ids = np.array([[CLS, a, b, c, MASK, a, MASK, space, SEP], [CLS, MASK, b, MASK, b, a, c, a, SEP]])
    contexts = {(0, 4): (b"abc", b"a"), (0, 6): (b"a", b" "), (1, 1): (b"", b"b"), (1, 3): (b"b", b"bac")}
    rows, columns = np.array(list(contexts)).T
    found = two_sided(join_files([("a", train)]), ids, rows, columns)
    for chances, (left, right) in zip(found, contexts.values()):
        expected = np.array([chance(train, left, x) * chance(train[::-1], right[::-1], x) / chance(train, b"", x)
                             for x in range(256)])  # fmt: skip
        assert chances == pytest.approx(expected / expected.sum())


def test_baselines_are_at_what_they_can_know(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    found = task(tmp_path).baselines(L)
    assert found["two-sided order-3 n-gram"] < 1 < 3 < found["unigram"] < task(tmp_path).chance(L) == 8
    assert task(folder).baselines(L)["two-sided order-3 n-gram"] > 3.3 * 0.8, "letters without any order"
    noise = random.Random(2)
    for index in range(30):
        (tmp_path / f"{index}.txt").write_bytes(bytes(noise.randrange(256) for _ in range(1500)))
    (tmp_path / "a.txt").unlink()
    # a byte that is shown is right in one case of two: then it costs one bit, else one more than chance
    assert task(tmp_path).baselines(L)["unigram"] == pytest.approx(0.8 * 8 + 0.1 * 1 + 0.1 * 9, abs=0.1)


def test_a_bag_of_bytes_knows_files_and_not_the_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "BAG_ROWS", 1500)
    order = task(folder, validation=0.1, test=0.5).further_baselines(L)["order_accuracy"]
    assert order["bag of bytes"] == pytest.approx(order["chance"], abs=0.1)
    after = task(folder, validation=0.1, test=0.5, pair="next").further_baselines(L)["next_accuracy"]
    assert after["bag of bytes"] > 0.8


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seq_len must leave 16 bytes beside CLS and SEP, 19, got 18"):
        task(folder).check(18)
    task(folder).check(19)
    (tmp_path / "a.txt").write_text("one document " * 50)
    with pytest.raises(ValueError, match=r"task.pair=next needs two documents for training, got 1"):
        task(tmp_path, pair="next").check(L)
    with pytest.raises(ValueError, match="pair must be one of order, next, none, got 'nsp'"):
        task(folder, pair="nsp")
    with pytest.raises(ValueError, match="mask must be a share between 0 and 1, got 1"):
        task(folder, mask=1)
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("short")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"must hold a document of at least 16 bytes for training"):
        task(tmp_path, duplicates=1).check(L)
