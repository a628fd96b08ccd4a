"""A disk that is full, read-only or broken at any write of a training, a benchmark or a report.

The call that fails is the n-th that opens, writes or renames. What was there before must be whole afterwards, the
failure must be one line that names a file or what is wrong, and the next call, on a sound disk, must end well.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_json, read_jsonl
from attention_zoo.report import build_report, write_csv
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

from . import Counts

TITLE = "writes that fail (full, read-only or broken disk) in trainings and reports"
SMALL, LARGE = 24, 1_000
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO)
TINY = (
    "tracker=none", "device=cpu", "trainer.progress=none", "task=mqar", "task.pairs=2", "task.test_examples=4",
    "model.dim=8", "model.heads=2", "model.depth=1", "seq_len=8", "batch=2", "steps=4", "trainer.checkpoint_every=2",
    "trainer.eval_every=2", "trainer.log_every=1", "threads=1",
)  # fmt: skip
ROW: dict[str, Any] = {"kind": "quality", "id": "x", "backend": "full", "status": "failed", "error": "made up"}


@contextmanager
def failing(after: int, code: int) -> Iterator[None]:
    """From the `after`-th on, every system call of this process that would write below a temporary folder fails."""
    left = after
    real = {name: getattr(os, name) for name in ("open", "write", "replace")}

    def broken(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
            if not reads:
                left -= 1
                if left < 0:
                    raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    try:
        for name in real:
            setattr(os, name, broken(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def run(count: int, seed: int) -> Counts:
    """Throw `count` failing disks, two of three at trainings."""
    found = Counts()
    config = compose_training(TINY)
    with tempfile.TemporaryDirectory() as made:
        sound = Path(made) / "sound"
        whole = run_training(config, sound)
        assert whole["status"] == "ok", whole["error"]
        for number in range(count):
            case = f"disk {seed}:{number}"
            rng = random.Random(case)
            folder = Path(made) / str(number)
            found.tries += 1
            throw = _report if number % 3 == 2 else _training
            for way, problem in throw(rng, config, sound, folder, whole):
                found.failed(way, f"{case}: {problem}")
            shutil.rmtree(folder, ignore_errors=True)
    return found


def _training(
    rng: random.Random, config: dict[str, Any], sound: Path, folder: Path, whole: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    after, code, again = rng.randrange(24), rng.choice(ERRORS), rng.random() < 0.5
    said = f"training, {errno.errorcode[code]} from write {after} on, {'again' if again else 'afresh'}"
    if again:
        shutil.copytree(sound, folder)
    try:
        with failing(after, code):
            row = run_training({**config, "force": again}, folder)
    except Exception as error:
        yield "raw", f"{said}: {type(error).__name__}: {error}"
        return
    if row["status"] != "ok" and (not row["error"] or "\n" in row["error"]):
        yield "raw", f"{said}: {row['error']!r}"
    yield from _torn(folder, said)
    after_all = run_training(config, folder)
    if (after_all["status"], after_all["metrics"]) != ("ok", whole["metrics"]):
        yield "lost", f"{said}: on a sound disk: {after_all['status']}, {after_all['error']}"


def _report(
    rng: random.Random, config: dict[str, Any], sound: Path, folder: Path, whole: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    after, code = rng.randrange(4), rng.choice(ERRORS)
    said = f"report, {errno.errorcode[code]} from write {after} on"
    folder.mkdir()
    before = {}
    for name in ("report.html", "results.csv"):
        (folder / name).write_text("older")
        before[name] = "older"
    try:
        with failing(after, code):
            build_report([ROW], folder / "report.html")
            write_csv([ROW], folder / "results.csv")
    except OSError as error:
        if error.filename is None:
            yield "raw", f"{said}: no file is named: {error}"
    except Exception as error:
        yield "raw", f"{said}: {type(error).__name__}: {error}"
    for name, old in before.items():
        text = (folder / name).read_text()
        if text != old and not text.rstrip().endswith(("</html>", "made up")) and "made up" not in text:
            yield "lost", f"{said}: {name} is neither old nor new"
    if leftovers := [path.name for path in folder.iterdir() if path.name not in before]:
        yield "lost", f"{said}: left {leftovers}"


def _torn(folder: Path, said: str) -> Iterator[tuple[str, str]]:
    """Files that are neither what was there nor something whole."""
    for path in folder.glob("*.json") if folder.is_dir() else ():
        try:
            read_json(path)
        except Damaged as error:
            yield "lost", f"{said}: {error}"
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        bad: list[str] = []
        list(read_jsonl(metrics, bad.append))
        for line in bad:
            yield "lost", f"{said}: {line}"
    row = folder / "result.json"
    if row.is_file() and json.loads(row.read_text())["status"] not in ("ok", "failed"):
        yield "wrong", f"{said}: {row.read_text()[:200]}"
