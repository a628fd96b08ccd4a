"""Sweeps that W&B follows, and whose W&B goes away in the middle: a server that dies, stalls or refuses from some
moment on, processes of W&B that are killed or stopped.

The sweep ends well within the time that W&B is given at each cell's end, with the figures of one that nobody follows,
and every cell is on the disk for W&B, or a line says what is not. Whatever happened, `sync` then brings the rest: a
server has every figure of every cell.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention_zoo.files import read_jsonl
from attention_zoo.tracking.receipts import receipts

from . import Counts
from .cells import ROOT, _left, _marked, _orphans, _send
from .signals import PATIENCE_S
from .sweeps import LAUNCHERS, WORDS, results, undisturbed
from .wandb_server import FAULTS, FINISH_SECONDS, INIT_SECONDS, Server, command_of, recorded

TITLE = "sweeps followed by W&B, whose server or processes go away in the middle"
SMALL, LARGE = 1, 20
HURTS = (signal.SIGKILL, signal.SIGSTOP)
"""What is done to W&B's processes; its server does the rest."""

OURS = ("wandb_process", "wandb-core")
"""In how W&B's processes are called."""

Found = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Have W&B go away in `count` sweeps."""
    found = Counts()
    with tempfile.TemporaryDirectory() as place:
        expected = undisturbed(Path(place) / "whole")
        for number in range(count):
            case = f"followed {seed}:{number}"
            found.tries += 1
            for way, problem in _throw(random.Random(case), Path(place) / str(number), expected):
                found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random, folder: Path, expected: dict[str, Any]) -> Found:
    launcher, fault, hurt = rng.choice(list(LAUNCHERS)), rng.choice(FAULTS), rng.choice((None, None, *HURTS))
    case = f"{launcher}, {'server ' + fault if hurt is None else hurt.name}"
    folder.mkdir()
    with _marked() as mark, Server() as server:
        job = _start(folder, launcher, server.url)
        until = time.monotonic() + PATIENCE_S
        while not server.runs and time.monotonic() < until and job.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 12))
        if hurt is None:
            server.fault = fault
        else:
            for each in _left(mark):
                if any(name in command_of(each) for name in OURS):
                    _send(each, hurt)
        try:
            said = job.communicate(timeout=PATIENCE_S)[0]
        except subprocess.TimeoutExpired:
            yield "hung", f"{case}: the sweep does not end"
            job.kill()
            said = job.communicate()[0]
        yield from _orphans(mark, case)
    if "Traceback" in said:
        yield "raw", f"{case}: {said[-500:]}"
    if job.returncode != 0:
        yield "lost", f"{case}: the sweep ended with {job.returncode}: {said[-500:]}"
    found = results(folder)
    if found != expected:
        yield "wrong", f"{case}: {[name for name in expected if found.get(name) != expected[name]]} differ"
    for name in found:
        with contextlib.suppress(FileNotFoundError):
            if b"train/loss" not in recorded(folder / name) and not _notices(folder / name):
                yield "lost", f"{case}: of {name} nothing is on the disk for W&B, and no word about it"

    yield from ((way, f"{case}: {problem}") for way, problem in _synced(folder, server))


def _synced(folder: Path, first: Server) -> Found:
    """Send what W&B lacks to a server that works; both together then have all."""
    with Server() as later:
        done = subprocess.run(
            [sys.executable, "-m", "attention_zoo", "sync", f"runs={folder}"], cwd=ROOT,
            env=_environment(folder, later.url), capture_output=True, text=True,
            errors="replace", timeout=PATIENCE_S,
        )  # fmt: skip
    if done.returncode != 0:
        yield "lost", f"sync ended with {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}"
        return
    for path in folder.glob("*/metrics.jsonl"):
        kept = {line["step"] for line in read_jsonl(path) if "train/loss" in line}
        (name,) = {found.of for _, found in receipts(path.parent)}
        there = [*first.history.get(name, []), *later.history.get(name, [])]
        if lacking := kept - {line["step"] for line in there if "train/loss" in line}:
            yield "lost", f"{path.parent.name} lacks {len(lacking)} of {len(kept)} rows after sync"
        elif {**first.summaries, **later.summaries}.get(name, {}).get("status") != "ok":
            yield "lost", f"{path.parent.name} is there without its result after sync"


def _notices(folder: Path) -> list[str]:
    from attention_zoo.training.records import RESULT, read_row

    return list(read_row(folder / RESULT)["notices"])


def _start(folder: Path, launcher: str, url: str) -> subprocess.Popen[str]:
    words = [word for word in WORDS if word != "tracker=none"]
    words += ["tracker=wandb", f"tracker.init_timeout={INIT_SECONDS}", f"tracker.finish_timeout={FINISH_SECONDS}"]
    words += [f"output={folder}", f"hydra/launcher={launcher}", *LAUNCHERS[launcher], "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", "attention_zoo", "train", *words], text=True, errors="replace", cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(folder, url),
    )  # fmt: skip


def _environment(folder: Path, url: str) -> dict[str, str]:
    """In which nothing of W&B's counts but a server."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    clean |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "NO_PROXY": "127.0.0.1"}
    clean |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "OMP_NUM_THREADS": "1"}
    return {**clean, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
