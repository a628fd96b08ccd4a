"""Corpora: an archive holds what a folder holds, whatever is damaged is said in a line, and a digest names the text."""

from __future__ import annotations

import hashlib
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_tasks_text import folder, task

from attention_zoo.tasks.text import list_files, read_files

__all__ = ["folder"]


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_an_archive_is_read_in_memory_as_the_folder_is(folder: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"archive{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for file in sorted(folder.rglob("*.txt"), reverse=True):
                made.write(file, file.relative_to(folder).as_posix())
            made.writestr("../outside.md", b"not to be written")
    else:
        with tarfile.open(path, "w:gz") as made:
            made.add(folder, ".")
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            made.addfile(link)

    def content(root: Path, most: int | None) -> dict[str, bytes]:
        return {name.removeprefix("./"): raw for name, raw in read_files(root, ".txt", most)}

    assert content(path, None) == content(folder, None)
    assert 0 < sum(map(len, content(path, 3000).values())) <= 3000
    broken = tmp_path / f"broken{ending}"
    broken.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"task.path: .*broken.* cannot be read"):
        task(broken).check(16)


def test_another_text_than_the_one_named_is_refused(folder: Path, tmp_path: Path) -> None:
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path, _ in list_files(folder)
    )
    right = hashlib.sha256(lines.encode()).hexdigest()
    assert task(folder, sha256=right.upper()).describe(16)["sha256"] == right
    (folder / "part0" / "more.txt").write_text("more")
    with pytest.raises(ValueError, match=rf"task.sha256 must be that of the text, [0-9a-f]* for .*, got '{right}'"):
        task(folder, sha256=right).check(16)
    book = tmp_path / "book.txt"
    book.write_bytes(b"words " * 300)
    task(book, sha256=hashlib.sha256(b"words " * 300).hexdigest()).check(16)
    with pytest.raises(ValueError, match="sha256 must be a SHA-256 of 64 hexadecimal digits, got 'abc'"):
        task(book, sha256="abc")


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_whatever_is_damaged_in_an_archive_is_said_in_a_line(tmp_path: Path, ending: str) -> None:
    words = [random.Random(index).randbytes(4).hex() for index in range(200)]
    sound = tmp_path / f"sound{ending}"
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(" ".join(random.Random(index).choices(words, k=300)))
    if ending == ".zip":
        with zipfile.ZipFile(sound, "w", zipfile.ZIP_DEFLATED) as made:
            for file in tmp_path.glob("*.txt"):
                made.write(file, file.name)
    else:
        with tarfile.open(sound, f"w:{ending[5:]}") as made:
            for file in tmp_path.glob("*.txt"):
                made.add(file, file.name)
    said = []
    for seed in range(40):
        draw, raw = random.Random(seed), bytearray(sound.read_bytes())
        if seed % 2:
            del raw[draw.randrange(len(raw)) :]
        else:
            for _ in range(30):
                raw[draw.randrange(len(raw))] ^= draw.randrange(1, 256)
        path = tmp_path / f"{seed}{ending}"  # another name each: files that were read are remembered
        path.write_bytes(raw)
        try:
            read_files(path, ".txt", None)
        except ValueError as error:  # or the damage is where nobody looks
            said.append((path, str(error)))
    assert len(said) >= 10
    assert all(line.startswith(f"task.path: {path} cannot be read: ") and "\n" not in line for path, line in said)


def test_packed_text_is_not_taken_for_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt.gz"
    path.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"task.path must be text, or one of .tar, .*, got '.*book.txt.gz': unpack it"):
        task(path)


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"first " * 300)
    before = task(book).describe(16)["digest"]
    book.write_bytes(b"other " * 300)
    assert task(book).describe(16)["digest"] != before
