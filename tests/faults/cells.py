"""Faults at benchmarks: mechanisms that end their process, kills of any process of the tree, damaged rows, odd names.

Nothing but the row of what was hit may change, nothing may be left behind, and the next call makes everything whole.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from unruly import ENDS, installed

from attention_zoo.jobs.trainings import Run
from attention_zoo.measure import cells as runner
from attention_zoo.measure.cell import SpeedCell, run_cell
from attention_zoo.measure.kept import read_rows

from . import Counts

TITLE = "benchmarks: mechanisms that end their process, kills, damaged rows, hostile names"
SMALL, LARGE = 6, 400
ROOT = Path(__file__).parents[2]
TINY = {"heads": 2, "head_width": 8, "threads": 1}
QUICK = {"repeats": 1, "budget_s": 0.01}
MARK = "ATTENTION_ZOO_FAULT"
"""In the environment of all that a try starts, by which what is left of it is found."""
PATIENCE_S = 15.0
"""In which orphans must be gone, on a machine under load."""

Found = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Throw `count` faults: of ten, one kills a part and one the parent; the rest are cheap."""
    found = Counts()
    with tempfile.TemporaryDirectory() as folder, installed(Path(folder)):
        for number in range(count):
            case = f"cells {seed}:{number}"
            throw = KINDS[number % len(KINDS)]
            found.tries += 1
            with tempfile.TemporaryDirectory() as place:
                for way, problem in throw(random.Random(case), Path(place)):
                    found.failed(way, f"{case}: {throw.__name__}: {problem}")
    return found


# --- mechanisms ------------------------------------------------------------------------------------------------------


def _mood(rng: random.Random, folder: Path) -> Found:
    """A mechanism that misbehaves, then one that does not."""
    mood = rng.choice(list(ENDS))
    made = [SpeedCell("unruly", length, options={"mood": each}, **TINY) for length, each in ((8, mood), (16, "good"))]
    with _marked() as mark:
        bad, good = runner.run_cells(made, folder, timeout_s=4, memory_limit_bytes=2**29, **QUICK)
        yield from _orphans(mark, mood)
    if bad["status"] != ENDS[mood] or "\n" in (bad["error"] or ""):
        yield "wrong", f"{mood}: {bad['status']}: {bad['error']}"
    if good["status"] != "ok":
        yield "lost", f"a good one after {mood}: {good['status']}: {good['error']}"


# --- damaged rows ----------------------------------------------------------------------------------------------------


class Home:
    """Cells run in this process: for faults at what surrounds them."""

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, cell: SpeedCell, *, timeout_s: float, **how: object) -> dict[str, object]:
        return run_cell(cell, **{**how, "memory_limit_bytes": None})  # type: ignore[arg-type]


def _edited(**fields: object) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        row = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in row.items() if value is not ...}))

    return damage


def _bytes(content: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        path.write_bytes(content(path.read_bytes(), rng))

    return damage


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "somebodys").write_text("content")


def _link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "empty": _bytes(lambda old, rng: b""),
    "cut": _bytes(lambda old, rng: old[: rng.randrange(1, len(old) - 2)]),
    "glued": _bytes(lambda old, rng: old + old),
    "zeros": _bytes(lambda old, rng: bytes(len(old))),
    "binary": _bytes(lambda old, rng: rng.randbytes(500)),
    "no UTF-8": _bytes(lambda old, rng: old.replace(b"full", b"f\xffll")),
    "UTF-16": _bytes(lambda old, rng: b"\xff\xfe" + old.decode().encode("utf-16-le")[:-1]),
    "a list": _bytes(lambda old, rng: b"[" + old + b"]"),
    "a number": _bytes(lambda old, rng: b"3"),
    "null": _bytes(lambda old, rng: b"null"),
    "deep": _bytes(lambda old, rng: b'{"a":' * 100_000),
    "other keys": _bytes(lambda old, rng: b'{"metrics": {}}'),
    "NaN": _edited(seconds=math.nan),
    "negative": _edited(seconds=-1.0),
    "words": _edited(seconds="fast"),
    "true": _edited(peak_bytes=True),
    "no seconds": _edited(seconds=None),
    "no status": _edited(status=...),
    "unknown status": _edited(status="fine"),
    "status of another type": _edited(status=["ok"]),
    "another's name": _edited(id="0123456789abcdef"),
    "another kind": _edited(kind="quality"),
    "config of another type": _edited(config=[]),
    "unknown config": _edited(config={"backend": "full", "length": 8, "wings": 2}),
    "length of another type": _edited(length="8"),
    "no limits": _edited(limits=...),
    "limits of another type": _edited(limits={"timeout_s": "long", "memory_limit_bytes": None}),
    "no environment": _edited(environment=None),
    "failed without a reason": _edited(status="failed", error=None),
    "a folder": _folder,
    "a link to nothing": _link,
}


def _damage(rng: random.Random, folder: Path) -> Found:
    """A row that cannot be read is named in one line and measured again; its neighbour is kept."""
    name = rng.choice(list(DAMAGES))
    made = [SpeedCell("full", length, **TINY) for length in (4, 8)]
    told: list[str] = []
    with mock.patch.object(runner, "Nursery", Home):
        first = runner.run_cells(made, folder, **QUICK)
        path = folder / "cells" / f"{first[1]['id']}.json"
        DAMAGES[name](path, rng)
        try:
            second = runner.run_cells(made, folder, on_bad=told.append, **QUICK)
        except Exception as error:
            yield "raw", f"{name}: {type(error).__name__}: {error}"
            return
        third = runner.run_cells(made, folder, on_bad=told.append, **QUICK)
    if len(told) != 1 or str(path) not in told[0] or "\n" in told[0] or len(told[0]) > 600:
        yield "raw", f"{name}: told {told}"
    if second[0] != first[0] or second[1]["status"] != "ok" or third != second:
        yield "lost", f"{name}: {second[1]['status']}"


# --- names -----------------------------------------------------------------------------------------------------------

PARTS = ("..", "/", "\\", "~", "\0", "\ud800", "\u202e", "é", "\n", " ", "a" * 150, "CON", ".", "-", "$(x)", "%s", "x")


def _name(rng: random.Random, folder: Path) -> Found:
    """A training's folder is inside of that of all, whatever it is called, and no other one's."""
    name = "".join(rng.choices(PARTS, k=rng.randrange(1, 6)))
    try:
        place = Run(name, {}).within(folder)
        place.mkdir()
    except (OSError, ValueError) as error:
        yield "raw", f"{name!r}: {error}"
        return
    if place.resolve().parent != folder.resolve():
        yield "wrong", f"{name!r} is at {place}"
    if Run(f"{name}/", {}).within(folder) == place:
        yield "wrong", f"{name!r} shares its folder"


# --- kills -----------------------------------------------------------------------------------------------------------

JOB = """
import sys
from attention_zoo import stopping
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.jobs.benchmark import benchmark
stopping.install()
print("begins", flush=True)
try:
    benchmark(BenchmarkConfig(
        backends=["unruly"], options={"unruly": {"mood": "pause"}}, baselines=False, lengths=[8, 16, 24], heads=2,
        head_width=8, threads=1, device="cpu", repeats=1, budget_s=0.01, timeout_s=60, output=sys.argv[1]))
except KeyboardInterrupt as stop:
    sys.exit(stop.code)
"""


def _kill_part(rng: random.Random, folder: Path) -> Found:
    """The worker or a cell is killed: one row at most is lost."""
    with _marked() as mark:
        job = _start(folder)
        until = time.monotonic() + 60
        parts: list[int] = []
        while job.poll() is None and not parts and time.monotonic() < until:
            parts = [each for each in _left(mark) if each != job.pid]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 6))
        parts = [each for each in _left(mark) if each != job.pid]
        for part in parts and [rng.choice(parts)]:
            _send(part, signal.SIGKILL)
        said = job.communicate(timeout=200)[0]
        yield from _orphans(mark, "a part was killed")
    rows = read_rows(folder / "cells", "speed", lambda line: None)
    if job.returncode or "Traceback" in said or len(rows) != 3:
        yield "raw", f"exit code {job.returncode}, {len(rows)} rows: {said[-500:]}"
    if sorted(row["status"] for row in rows)[:1] == ["failed"] or sum(row["status"] != "ok" for row in rows) > 1:
        yield "wrong", str([(row["status"], row["error"]) for row in rows])
    yield from _whole(folder)


def _kill_parent(rng: random.Random, folder: Path) -> Found:
    """The job itself is ended: with it all that it has started, and what is there is whole."""
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    with _marked() as mark:
        job = _start(folder)
        assert job.stdout is not None
        job.stdout.readline()
        time.sleep(rng.uniform(0, 9))
        _send(job.pid, number)
        said = job.communicate(timeout=60)[0]
        yield from _orphans(mark, f"the parent got {number.name}")
    wanted = {signal.SIGKILL: -9, signal.SIGINT: 130}.get(number, 75)
    if job.returncode not in (wanted, 0) or "Traceback" in said:  # 0: it was through before
        yield "raw", f"{number.name}: exit code {job.returncode}: {said[-500:]}"
    if left := list((folder / "tmp").iterdir()):
        yield "orphan", f"{number.name}: temporary files {left}"
    told: list[str] = []
    read_rows(folder / "cells", "speed", told.append)
    for line in (folder / "results.jsonl").read_text().splitlines() if (folder / "results.jsonl").exists() else ():
        json.loads(line)
    if told:
        yield "lost", f"{number.name}: {told}"
    yield from _whole(folder)


def _whole(folder: Path) -> Found:
    """The next call leaves everything done and nothing else."""
    job = _start(folder)
    said = job.communicate(timeout=200)[0]
    path = folder / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if job.returncode or [row["status"] for row in rows] != ["ok"] * 3:
        yield "lost", f"the next call: exit code {job.returncode}, {[row['status'] for row in rows]}: {said[-500:]}"
    left = [str(each) for each in folder.rglob(".*") if each.name != ".lock"]
    if left:
        yield "orphan", f"files {left}"


def _start(folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(folder / "tmp")},
    )


class _marked:
    """All processes that start meanwhile carry a mark."""

    def __enter__(self) -> str:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        os.environ[MARK] = self.mark
        return self.mark

    def __exit__(self, *error: object) -> None:
        del os.environ[MARK]


def _left(mark: str) -> list[int]:
    """Processes that carry the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def _orphans(mark: str, after: str) -> Found:
    until = time.monotonic() + PATIENCE_S
    while (left := _left(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for each in left:
        _send(each, signal.SIGKILL)
    if left:
        yield "orphan", f"{len(left)} processes after {after}"


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it was through
        return


KINDS = (_damage, _mood, _name, _damage, _kill_parent, _mood, _damage, _name, _kill_part, _mood)
