"""Long-Range Arena's pictures and drawings: rows are the pixels of the files, and what is damaged is named."""

from __future__ import annotations

import pickle
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_tasks_public_lra import rows

from attention_zoo.tasks.public.lra_image import RECORD, LraImage, grey
from attention_zoo.tasks.public.lra_pathfinder import LraPathfinder


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


def test_names_that_no_file_can_have_and_arrays_of_bytes_are_told_apart(drawings: Path) -> None:
    path = drawings / "curv_contour_length_14" / "metadata" / "2.npy"
    expected, lines = LraPathfinder(path=str(drawings)).describe(1024), path.read_text().splitlines()
    np.save(path, np.array([line.encode().split() for line in lines]))
    assert LraPathfinder(path=str(drawings)).describe(1024) == expected
    path.write_text("imgs/2 a\0b.png 0 1\n")
    with pytest.raises(ValueError, match=r"2.npy, line 1: each line must name an image that is there"):
        LraPathfinder(path=str(drawings)).check(1024)
