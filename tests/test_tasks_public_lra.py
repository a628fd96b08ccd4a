"""Long-Range Arena's files: rows are what the files say, in published splits, and a broken line is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from attention_zoo.model.transformer import Transformer
from attention_zoo.tasks.public import table
from attention_zoo.tasks.public.labelled import Labelled, spread
from attention_zoo.tasks.public.lra_image import LraImage
from attention_zoo.tasks.public.lra_listops import VOCABULARY, LraListOps
from attention_zoo.tasks.public.lra_pathfinder import LraPathfinder
from attention_zoo.tasks.public.lra_retrieval import SEPARATOR, LraRetrieval
from attention_zoo.tasks.public.lra_text import LraText
from attention_zoo.training.objective import answers

EXPRESSIONS = [  # as the published generator writes them, with the value of each
    ("( ( ( [MAX 2 ) ( ( ( [MIN 7 ) 1 ) ] ) ) ] )", 2),
    ("( ( ( ( [SM 9 ) 9 ) 4 ) ] )", 2),
    ("( ( ( ( [MED 1 ) 8 ) 5 ) ] )", 5),
    ("( ( ( [MIN 3 ) ( ( ( [SM 5 ) 6 ) ] ) ) ] )", 1),
]


@pytest.fixture
def listops(tmp_path: Path) -> Path:
    for name, count in (("train", 40), ("val", 8), ("test", 12)):
        rows = [EXPRESSIONS[(index * 7) % 4] for index in range(count)]
        lines = ["Source\tTarget", *(f"{source}\t{value}" for source, value in rows)]
        (tmp_path / f"basic_{name}.tsv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())  # as csv writes
    return tmp_path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for folder in ("neg", "pos"):
            (tmp_path / split / folder).mkdir(parents=True)
            for index in range(20):
                text = f"{split} {folder} {index}: " + "é word " * index
                (tmp_path / split / folder / f"{index}_1.txt").write_text(text)
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("no label")
    return tmp_path


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    for split, count in (("train", 30), ("eval", 6), ("test", 7)):
        rows = [f"{index % 2}.0\tP{index}\tQ{index}\tfirst {index} é\tother {'x' * index}" for index in range(count)]
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("\n".join(rows))  # the last line is not ended
    return tmp_path


def rows(task: Labelled, split: str, length: int) -> list[tuple[list[int], int]]:
    """Tokens and label of each row of a split, without padding."""
    part = task.parts[split]
    batch = task.batch(part, range(len(part.labels)), length)
    valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.tokens is None else batch.tokens.valid
    return [
        (ids[keep].tolist(), label) for ids, keep, label in zip(batch.ids, valid, batch.targets.tolist(), strict=True)
    ]


def test_listops_reads_expressions_without_parentheses(listops: Path) -> None:
    task = LraListOps(path=str(listops))
    assert (task.vocab, task.classes, task.objective) == (15, 10, "classify")
    words = [word.decode() for word in VOCABULARY]
    for split, count in (("train", 40), ("validation", 8), ("test", 12)):
        found = rows(task, split, 20)
        assert len(found) == count
        for index, (ids, label) in enumerate(found):
            source, value = EXPRESSIONS[(index * 7) % 4]
            assert [words[i] for i in ids] == source.replace("(", "").replace(")", "").split()
            assert label == value
    assert [len(ids) for ids, _ in rows(task, "test", 5)] == [5] * 12, "longer rows are cut"


def test_listops_baselines(listops: Path) -> None:
    found = LraListOps(path=str(listops)).baselines(20)
    assert found == {"majority": 0.5, "first_operator": 1.0}, "in these rows the operator tells all"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MAX 1 2 ]", r"line 4: a line must have 2 fields between tabs \(Source, Target\), got 1"),
        ("[MAX 1 2 ]\t2\t2", "line 4: a line must have 2 fields between tabs .* got 3"),
        ("[MAX 1 2 ]\t12", "line 4: Target must be one of 0, 1, .* 9, got '12'"),
        ("[MAXI 1 2 ]\t2", r"line 4: Source must be made of 0, .*\], got '\[MAXI'"),
        ("( )\t2", "line 4: Source must be made of .* got ''"),
        ("", "line 4: a line must have 2 fields .* got 1"),
    ],
)
def test_a_broken_line_of_listops_is_named(listops: Path, line: str, message: str) -> None:
    (listops / "basic_test.tsv").write_text(f"Source\tTarget\n[MIN 1 2 ]\t1\n[MIN 1 2 ]\t1\n{line}\n[MIN 1 2 ]\t1\n")
    with pytest.raises(ValueError, match=r"lra_listops: .*/basic_test.tsv, " + message):
        rows(LraListOps(path=str(listops)), "test", 20)


def test_a_wrong_header_is_named(listops: Path) -> None:
    (listops / "basic_val.tsv").write_text("Target\tSource\n1\t[MIN 1 2 ]\n")
    with pytest.raises(ValueError, match=r"basic_val.tsv, line 1: the header must be \['Source', 'Target'\], got"):
        LraListOps(path=str(listops)).check(20)
    (listops / "basic_val.tsv").write_text("")
    with pytest.raises(ValueError, match=r"line 1: the header must be .* got \[\]"):
        LraListOps(path=str(listops)).check(20)
    (listops / "basic_val.tsv").write_text("Source\tTarget\n")
    with pytest.raises(ValueError, match="lra_listops: there are no rows for validation"):
        LraListOps(path=str(listops)).check(20)


def test_tables_are_scanned_block_by_block(papers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows(LraRetrieval(path=str(papers)), "train", 61)
    monkeypatch.setattr(table, "BLOCK", 7)
    assert rows(LraRetrieval(path=str(papers)), "train", 61) == whole


def test_imdb_is_bytes_with_the_folder_as_label(reviews: Path) -> None:
    task = LraText(path=str(reviews))
    found = rows(task, "train", 40)
    assert len(found) == 40, "reviews without label are not read"
    assert [label for _, label in found] == [0] * 20 + [1] * 20
    for ids, label in found:
        text = bytes(ids)
        index = int(text.split()[2].rstrip(b":"))
        raw = (reviews / "train" / ("neg", "pos")[label] / f"{index}_1.txt").read_bytes()
        assert text == raw[:40]
    assert rows(task, "validation", 40) == rows(task, "test", 40), "the benchmark validates on the test set"
    sets = LraText(path=str(reviews), validation_rows=4).evaluation_sets(3, 40)
    assert [sum(len(batch.ids) for batch in found) for found in sets.values()] == [4, 40]


def test_a_share_that_leaves_a_split_empty_is_named(reviews: Path) -> None:
    for share, split in ((0.001, "validation"), (0.999, "train")):
        with pytest.raises(ValueError, match=f"there are no rows for {split} with task.validation={share}"):
            LraText(path=str(reviews), validation=share).check(40)


def test_imdb_can_hold_back_training_reviews(reviews: Path) -> None:
    task = LraText(path=str(reviews), validation=0.3)
    train, validation, test = ({bytes(ids) for ids, _ in rows(task, split, 200)} for split in task.parts)
    assert not train & validation
    assert not (train | validation) & test
    assert train | validation == {bytes(ids) for ids, _ in rows(LraText(path=str(reviews)), "train", 200)}
    assert 4 <= len(validation) <= 20
    assert task.describe(9)["digest"] != LraText(path=str(reviews)).describe(9)["digest"]
    assert task.describe(9)["rows"] == {"train": len(train), "validation": len(validation), "test": 40}


def test_pairs_are_two_texts_and_a_separator(papers: Path) -> None:
    task = LraRetrieval(path=str(papers))
    found = rows(task, "test", 61)
    assert len(found) == 7
    for index, (ids, label) in enumerate(found):
        at = ids.index(SEPARATOR)
        assert bytes(ids[:at]).decode() == f"first {index} é"
        assert bytes(ids[at + 1 :]).decode() == f"other {'x' * index}"
        assert label == index % 2
    batch = task.batch(task.parts["train"], [29], 21)
    assert bytes(batch.ids[0, :10].tolist()) == b"first 29 \xc3", "cut at (21 - 1) / 2 bytes"
    assert batch.ids[0, 10] == SEPARATOR
    assert batch.types is not None
    assert batch.types[0].tolist() == [0] * 11 + [1] * 10
    assert batch.tokens is None, "no padding"
    with pytest.raises(ValueError, match="seq_len must be at least 3"):
        task.check(2)


def test_pairs_without_texts_are_refused(papers: Path) -> None:
    (papers / "new_aan_pairs.eval.tsv").write_text("1\tP1\tQ1\n")
    with pytest.raises(ValueError, match=r"line 1: a line must have 5 fields .*label, id1, id2, text1, text2\), got 3"):
        LraRetrieval(path=str(papers)).check(21)
    (papers / "new_aan_pairs.eval.tsv").write_text("1\tP1\tQ1\ta\tb\nyes\tP1\tQ1\ta\tb\n")
    with pytest.raises(ValueError, match=r"line 2: label must be one of 0, 1, 0.0, 1.0, got 'yes'"):
        LraRetrieval(path=str(papers)).check(21)


@pytest.mark.parametrize(
    ("task", "part", "origin"),
    [
        (LraListOps, "basic_train.tsv", "lra_release.gz"),
        (LraText, "train/neg", "aclImdb_v1.tar.gz"),
        (LraRetrieval, "new_aan_pairs.train.tsv", "lra_release.gz"),
        (LraImage, "data_batch_1.bin", "cifar-10-binary.tar.gz"),
        (LraPathfinder, "curv_contour_length_14/metadata", "lra_release.gz"),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path, task: type, part: str, origin: str) -> None:
    with pytest.raises(ValueError, match=rf"task.path must say where the data of lra_\w+ lie.*{origin}"):
        task()
    with pytest.raises(ValueError, match=rf"{tmp_path}/{part}.* is missing from the data: .*{origin}"):
        task(path=str(tmp_path)).check(task.length or 1024)


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own(papers: Path) -> None:
    task = LraRetrieval(path=str(papers))

    def epochs(seed: int) -> list[list[int]]:
        batches = task.train_batches(7, 21, seed)
        seen = [row for _ in range(9) for row in next(batches).ids[:, 6:8].tolist()]  # the number of each row
        marks = [int(bytes(mark).rstrip()) for mark in seen]
        return [marks[:30], marks[30:60]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


@pytest.mark.parametrize("steps", [0, 3, 5, 11])
def test_batches_go_on_after_a_restart(papers: Path, steps: int) -> None:
    task = LraRetrieval(path=str(papers))
    whole, later = task.train_batches(7, 21, seed=2), task.train_batches(7, 21, seed=2)
    for _ in range(steps):
        next(whole)
    later.load_state_dict(whole.state_dict())
    for _ in range(6):
        expected, found = next(whole), next(later)
        assert torch.equal(expected.ids, found.ids)
        assert torch.equal(expected.targets, found.targets)


def test_evaluation_takes_rows_in_order_whatever_the_batch(listops: Path) -> None:
    task = LraListOps(path=str(listops), validation_rows=3)
    for found in (task.evaluation_sets(5, 20), task.evaluation_sets(12, 20)):
        labels = {name: torch.cat([batch.targets for batch in batches]).tolist() for name, batches in found.items()}
        assert labels["test"] == [EXPRESSIONS[(index * 7) % 4][1] for index in range(12)]
        assert labels["validation"] == [EXPRESSIONS[(index * 7) % 4][1] for index in (0, 4, 7)]
    assert spread(5, None).tolist() == spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert task.chance(20) == 0.1


def test_describe_names_the_content(listops: Path) -> None:
    told = LraListOps(path=str(listops)).describe(20)
    assert told["rows"] == {"train": 40, "validation": 8, "test": 12}
    assert set(told["files"]) == {"basic_train.tsv", "basic_val.tsv", "basic_test.tsv"}
    assert all(len(entry["sha256"]) == 64 for entry in told["files"].values())
    with (listops / "basic_test.tsv").open("a") as file:
        file.write("[MIN 1 2 ]\t1\n")
    assert LraListOps(path=str(listops)).describe(20)["digest"] != told["digest"]


def test_a_model_learns_from_padded_pairs(papers: Path) -> None:
    draw = random.Random(0)
    lines = []
    for _ in range(60):
        label = draw.randrange(2)
        lines.append(f"{label}\tP\tQ\t{'b' if label else 'a'}\t{'x' * draw.randrange(8)}")
    (papers / "new_aan_pairs.train.tsv").write_text("\n".join(lines))
    task = LraRetrieval(path=str(papers))
    model = Transformer(
        attention="full", vocab=task.vocab, dim=16, heads=2, depth=1, causal=False, head="classify", classes=2,
        embedding={"types": 2},
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = task.train_batches(16, 17, seed=0)
    for _ in range(40):
        batch = next(batches)
        said = answers(model(batch.ids, batch.tokens, types=batch.types), batch)["main"]
        optimizer.zero_grad()
        said.losses.mean().backward()
        optimizer.step()
    assert said.hits.double().mean() > 0.95
