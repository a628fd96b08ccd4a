"""Long-Range Arena's files: rows are what the files say, in published splits, and a broken line is named."""

from __future__ import annotations

import pickle
import random
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_zoo.model.transformer import Transformer
from attention_zoo.tasks.public import table
from attention_zoo.tasks.public.labelled import Labelled, spread
from attention_zoo.tasks.public.lra_image import RECORD, LraImage, grey
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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        records = draw.integers(0, 256, (8, RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / f"{name}.bin")
    return tmp_path


def png(pixels: np.ndarray) -> bytes:
    """A grey image of 8 bits, without filters."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    high, wide = pixels.shape
    head = wide.to_bytes(4, "big") + high.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Two lists of twenty drawings; pixel (0, 0) tells list and number, (0, 1) the label. One file is empty."""
    root = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (root / "metadata").mkdir(parents=True)
    for part in (2, 10):
        (root / "imgs" / str(part)).mkdir(parents=True)
        lines = []
        for index in range(20):
            pixels = np.full((32, 32), 7, np.uint8)
            pixels[0, :2] = 20 * part + index, index % 2
            name = f"sample_{index}.png"
            (root / "imgs" / str(part) / name).write_bytes(png(pixels) if (part, index) != (2, 3) else b"")
            lines.append(f"imgs/{part} {name} {index} {index % 2} 1.8 6 2 0.75 2 14 32 32\n")
        (root / "metadata" / f"{part}.npy").write_text("".join(lines))
    return tmp_path / "pathfinder32"


@pytest.fixture
def pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow, or where it is not installed what reads the images of these tests."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        pass
    else:
        return

    class Image:
        def __init__(self, path: Path):
            raw = path.read_bytes()
            if not raw.startswith(b"\x89PNG"):
                raise OSError("cannot identify image file")
            wide, high = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
            start = raw.index(b"IDAT")
            size = int.from_bytes(raw[start - 4 : start], "big")
            rows = np.frombuffer(zlib.decompress(raw[start + 4 : start + 4 + size]), np.uint8).reshape(high, wide + 1)
            self.pixels = rows[:, 1:]

        def __enter__(self) -> Image:
            return self

        def __exit__(self, *_: object) -> None: ...

        def convert(self, mode: str) -> np.ndarray:
            assert mode == "L"
            return self.pixels

    package, module = types.ModuleType("PIL"), types.ModuleType("PIL.Image")
    module.open = Image  # type: ignore[attr-defined]
    package.Image = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "PIL", package)
    monkeypatch.setitem(sys.modules, "PIL.Image", module)


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


def test_pictures_are_the_records_in_grey(pictures: Path) -> None:
    task = LraImage(path=str(pictures))
    task.check(1024)
    raw = np.concatenate([np.fromfile(pictures / f"data_batch_{n}.bin", np.uint8) for n in range(1, 6)])
    records = raw.reshape(40, RECORD)
    found = rows(task, "train", 1024) + rows(task, "validation", 1024)
    assert [label for _, label in found] == records[:, 0].tolist()
    assert len(rows(task, "validation", 1024)) == 4, "the last tenth"
    for (ids, _), record in zip(found, records, strict=True):
        red, green, blue = record[1:].astype(float).reshape(3, 1024)
        luma = (0.2989 * red + 0.5870 * green + 0.1140 * blue) / 255 * 255.5
        assert np.abs(np.array(ids) - luma + 0.5).max() <= 0.5 + 1e-3
    black, white = np.zeros((3, 1), np.uint8), np.full((3, 1), 255, np.uint8)
    assert (grey(black)[0], grey(white)[0]) == (0, 255)
    assert np.array_equal(grey(np.array([[255], [0], [0]], np.uint8)), [76])
    with pytest.raises(ValueError, match="seq_len must be 1024, the tokens of each row of lra_image, got 1000"):
        task.check(1000)


def test_no_pickle_is_opened(pictures: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return pytest.fail, ("ran what a pickle holds",)

    (pictures / "data_batch_3.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"data_batch_3.bin, size in bytes: the file must hold whole records of 3073"):
        LraImage(path=str(pictures)).check(1024)
    records = np.zeros((3, RECORD), np.uint8)
    records[1, 0] = 10
    records.tofile(pictures / "data_batch_3.bin")
    with pytest.raises(ValueError, match=r"data_batch_3.bin, record 2: the label must be 0 to 9, got 10"):
        LraImage(path=str(pictures)).check(1024)


@pytest.mark.usefixtures("pillow")
def test_drawings_are_split_once_and_for_all(drawings: Path) -> None:
    task = LraPathfinder(path=str(drawings))
    assert task.name == "lra_pathfinder32"
    found = {split: rows(task, split, 1024) for split in task.parts}
    assert [len(part) for part in found.values()] == [31, 4, 4], "80, 10 and 10 % of the 39 that are not empty"
    marks = [ids[0] for part in found.values() for ids, _ in part]
    assert sorted(marks) == sorted(m for m in [*range(40, 60), *range(200, 220)] if m != 43)
    assert all(ids[1] == label for part in found.values() for ids, label in part)
    assert found == {split: rows(LraPathfinder(path=str(drawings)), split, 1024) for split in task.parts}
    inner = LraPathfinder(path=str(drawings / "curv_contour_length_14"))
    assert inner.describe(1024) == task.describe(1024)
    with pytest.raises(ValueError, match="seq_len must be 16384"):
        LraPathfinder(path=str(drawings), side=128).check(1024)
    with pytest.raises(ValueError, match=r"sample_\d+.png: the image must have 128 x 128 pixels, got \(32, 32\)"):
        rows(LraPathfinder(path=str(drawings), side=128), "train", 16384)
    (drawings / "curv_contour_length_14" / "imgs" / "2" / "sample_0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"sample_0.png: the file must be an image, got .cannot identify image file"):
        LraPathfinder(path=str(drawings)).drawings.ids(0, 1024)


def test_images_need_pillow(drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    task = LraPathfinder(path=str(drawings))
    task.check(1024)
    with pytest.raises(
        ValueError, match="task=lra_pathfinder32 reads images with the package Pillow: pip install pill"
    ):
        next(task.train_batches(2, 1024, 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imgs/2 sample_0.png 0", "line 2: each line must be folder, file, number and label 0 or 1, got 'imgs/2"),
        ("imgs/2 sample_0.png 0 2", "line 2: each line must be folder, file, number and label 0 or 1"),
        ("imgs/2 missing.png 0 1", "line 2: each line must name an image that is there, got 'imgs/2/missing.png'"),
        ("/etc passwd 0 1", "line 2: images must lie within the folder, got '/etc/passwd'"),
        ("imgs/../../.. x.png 0 1", "line 2: images must lie within the folder"),
    ],
)
def test_a_broken_line_of_metadata_is_named(drawings: Path, line: str, message: str) -> None:
    (drawings / "curv_contour_length_14" / "metadata" / "2.npy").write_text(f"imgs/2 sample_1.png 1 1\n{line}\n")
    with pytest.raises(ValueError, match=r"lra_pathfinder32: .*metadata/2.npy, " + message):
        LraPathfinder(path=str(drawings)).check(1024)


def test_true_arrays_of_metadata_are_read_but_never_unpickled(drawings: Path) -> None:
    path = drawings / "curv_contour_length_14" / "metadata" / "2.npy"
    expected = LraPathfinder(path=str(drawings)).describe(1024)
    np.save(path, np.array([line.split() for line in path.read_text().splitlines()]))
    assert LraPathfinder(path=str(drawings)).describe(1024) == expected

    class Trap:
        def __reduce__(self) -> tuple:
            return pytest.fail, ("ran what a pickle holds",)

    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(
        ValueError, match=r"2.npy: the file must be text, or an array of text, got 'Object arrays cannot"
    ):
        LraPathfinder(path=str(drawings)).check(1024)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"2.npy: the file must be text"):
        LraPathfinder(path=str(drawings)).check(1024)


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
