"""Who follows a sweep, by its words or its folders: what cannot be told, or not written, keeps nobody from stopping it
or from looking.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from attention_zoo import locks
from attention_zoo.commands.watch import Watch
from attention_zoo.files import write_row
from attention_zoo.jobs.plan import Plan
from attention_zoo.jobs.status import StatusConfig, status
from attention_zoo.locks import CLAIMS, owner, owning
from attention_zoo.training.progress import Progress
from attention_zoo.training.records import METRICS, RESULT, blank_row
from attention_zoo.words import say


class Unread:
    """An output whose reader has gone, as `... | head` leaves it."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


ROW = blank_row({"backend": "full"}) | {"steps": 10, "train_seconds": 4.0, "metrics": {"accuracy": 0.5}}


def until(told: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not told() and time.monotonic() < deadline:
        time.sleep(0.02)
    return told()


@pytest.mark.parametrize("wrong", [None, PermissionError("not for you")])
def test_workers_hear_when_to_stop_whatever_becomes_of_the_words(
    wrong: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, told, gone = [False], list[str](), list[Console]()

    def on_broken_pipe(self: Console) -> None:
        gone.append(self)
        raise SystemExit(1)  # Rich's own, which also turns this process's output away

    monkeypatch.setattr(Console, "on_broken_pipe", on_broken_pipe)
    cell: Any = SimpleNamespace(folder=tmp_path / "cell")
    watch = Watch({"seed=0": cell}, 2, tmp_path, tmp_path / ".stop", lambda: asked[0])
    watch.console = Console(file=Unread())  # type: ignore[arg-type]

    def tell() -> None:
        told.append("told")
        if wrong is not None:
            raise wrong
        Watch._tell(watch)

    monkeypatch.setattr(watch, "_tell", tell)
    with watch:
        write_row(cell.folder / RESULT, ROW)
        assert until(lambda: len(told) > 1)
        asked[0] = True
        assert until(watch.stop.exists), "the workers are never told"
        assert watch.thread.is_alive()
    assert not watch.stop.exists()
    assert bool(gone) == (wrong is None)
    assert capsys.readouterr().err.count("not for you") == (wrong is not None)


def only_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any, **_named: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)


def test_a_folder_that_can_only_be_read_tells_who_works_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "text-full-0123456789abcdef"
    with owning(place), owning(place, names=CLAIMS):
        (place / METRICS).write_text('{"step": 3}\n')
        with monkeypatch.context() as here:
            only_to_read(here)
            for names in (locks.WRITES, CLAIMS):
                found = owner(place, names)
                assert found is not None
                assert found["pid"] == os.getpid()
            status(StatusConfig(str(tmp_path)))
            assert "running" in capsys.readouterr().out
    only_to_read(monkeypatch)
    assert owner(place) is None
    assert owner(place, CLAIMS) is None
    status(StatusConfig(str(tmp_path)))
    assert "lost" in capsys.readouterr().out


def test_the_command_that_goes_on_can_be_typed_from_any_folder() -> None:
    assert Plan("zoo train", "/my runs/it's", []).again() == "cd '/my runs/it'\"'\"'s' && zoo train"


@contextmanager
def unheard() -> Iterator[int]:
    """Standard error is a pipe whose reader has ended: `2>&1 | head`, a terminal that was closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream, redirect_stderr(stream):
        yield writer  # closing it writes what is left, and would fail


@pytest.mark.parametrize("kind", ["lines", "bar", "none"])
def test_a_run_goes_on_whoever_hears_of_it(kind: str) -> None:
    with unheard(), Progress("full text", 10, kind) as progress:
        progress.notice("goes on after step 3")
        progress.warn("the disk is slow")
        progress.update(4, 2.0, 100.0)
        progress.notice("through")
    assert progress.warnings == ["the disk is slow"]


def test_words_that_nobody_hears_end_nothing() -> None:
    with unheard() as where:
        say("error: once")
        say("error: and again")
        assert stat.S_ISCHR(os.fstat(where).st_mode), "it goes nowhere from then on"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_words_on_a_full_disk_are_left_out() -> None:
    stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with redirect_stderr(stream):
        say("error: once")
        assert os.fstat(stream.fileno()).st_rdev == os.stat("/dev/full").st_rdev, "there may be room later"
        with pytest.raises(OSError, match="No space"):
            stream.close()
        say("error: into a file that was closed")
