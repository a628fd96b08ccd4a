"""Trainings that are killed or asked to stop at any moment, again and again, and end as if nothing had been.

Each is compared with one that nobody disturbed: weights, row and every logged figure, bit for bit. A process that has
torch already forks each of them, so that most of a try is training.
"""

from __future__ import annotations

import contextlib
import json
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where this file is run by its path

from faults import Counts

TITLE = "trainings killed (SIGKILL) or asked to stop (SIGTERM, SIGHUP, SIGUSR1, Ctrl-C) at random moments"
SMALL, LARGE = 6, 250
LIMIT_SECONDS = 120.0
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
CODES = {"SIGKILL": -9, "SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGINT": 130}
TINY = (
    "tracker=none", "device=cpu", "trainer.progress=none", "model.dim=16", "model.heads=2", "model.depth=2",
    "model.ff_mult=2", "model.output_dropout=0.1", "seq_len=12", "batch=4", "steps=40", "trainer.checkpoint_every=5",
    "trainer.eval_every=4", "trainer.log_every=2", "task.held_out=attention_zoo", "task.evaluation_rows=3",
    "task.span=3", "threads=1",
)  # fmt: skip
CONFIGS = (
    (), ("trainer.stop_at=100.0",), ("trainer.patience=1", "optimizer.lr=0.0"), ("attention=reformer",),
    ("attention=transformer_xl", "attention.segment_length=5", "attention.memory_length=7"),
    ("trainer.accumulate=2", "trainer.eval_every=7", "trainer.checkpoint_every=3"),
)  # fmt: skip
TEXT = ("task.held_out", "task.evaluation_rows", "task.span")
"""Fields of reading on that masked text does not have."""
SAME = (
    "id", "status", "error", "steps", "curve", "quality_curve", "metrics", "evaluations", "loss_by_position", "stopped",
    "carries_state", "data", "parameters", "model_sha256",
)  # fmt: skip
"""What of a row is not about time."""


def serve() -> None:
    """Fork a training for each line [config, folder] of standard input, tell its process id, then its exit code."""
    import torch

    from attention_zoo import stopping
    from attention_zoo.training.run import run_training

    torch.use_deterministic_algorithms(True)
    for line in sys.stdin:
        config, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                stopping.install()
                code = 0 if run_training(config, folder)["status"] == "ok" else 1
            except stopping.Stopped as stopped:
                code = stopped.code
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Forge:
    """Trainings in forked processes, one after the other; a context."""

    def __enter__(self) -> Forge:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        return self

    def __exit__(self, *given: object) -> None:
        self.process.kill()
        self.process.communicate()

    def train(
        self, config: dict[str, Any], folder: Path, by: str | None = None, after: float = 0.0
    ) -> tuple[int, float]:
        """Train, and send the signal `by` after so many seconds. Its exit code and how long it ran."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([config, str(folder)]) + "\n")
        self.process.stdin.flush()
        child, began = int(self.process.stdout.readline()), time.monotonic()
        if by is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, getattr(signal, by))
        return int(self.process.stdout.readline()), time.monotonic() - began


def run(count: int, seed: int) -> Counts:
    """Send `count` signals."""
    from attention_zoo import registry
    from attention_zoo.training.config import compose_training

    found = Counts()
    rng = random.Random(f"kills {seed}")
    with tempfile.TemporaryDirectory() as place, Forge() as forge:
        text = Path(place) / "text"
        text.mkdir()
        for index in range(6):
            (text / f"{index}.txt").write_bytes(bytes(rng.choice(b"abcdefgh \n") for _ in range(70 + 20 * index)))
        whole: dict[tuple[str, ...], tuple[Any, float]] = {}
        names, number = [*registry.available(), *registry.wrappers()], 0
        rng.shuffle(names)
        while found.tries < count:
            chosen = rng.choice(CONFIGS) if number % 3 == 2 else _of_mechanism(names[number % len(names)], rng)
            number += 1
            given = {word.partition("=")[0] for word in chosen}
            words = [word for word in TINY if "task=mlm" not in chosen or not word.startswith(TEXT)]
            own = [word for word in words if word.partition("=")[0] not in given]
            config = compose_training([*own, f"task.path={text}", *chosen])
            if chosen not in whole:
                folder = Path(place) / f"whole-{len(whole)}"
                code, took = forge.train(config, folder)
                assert code == 0, (folder / "result.json").read_text()
                whole[chosen] = left_by(folder), took
            expected, took = whole[chosen]
            folder = Path(place) / f"cut-{found.tries}"
            kills = [(rng.choice(SIGNALS), rng.uniform(0, 1.1 * took)) for _ in range(rng.randint(1, 3))]
            case = f"kills {seed}: {' '.join(chosen) or 'default'}; {kills}"
            found.tries += len(kills)
            for way, problem in _throw(forge, config, folder, kills, expected):
                found.failed(way, f"{case}: {problem}")
    return found


def _of_mechanism(name: str, rng: random.Random) -> tuple[str, ...]:
    """A mechanism with options of a few tokens, and whatever else has a part in where a run stands."""
    from attention_zoo.jobs.space import word_of
    from attention_zoo.registry import recipe

    kind = recipe(name)[0]
    tiny = (f"attention.{key}={word_of(value)}" for key, value in kind.tiny.items())
    task = ("task=mlm", "seq_len=20", "task.evaluation_rows=2") if kind.declared.causality == "none" else ()
    drawn = {
        "model.output_dropout": (0.0, 0.2), "trainer.accumulate": (1, 2), "trainer.ahead": (0, 0, 2),
        "trainer.carry_state": ("true", "true", "false"), "trainer.checkpoint_every": (1, 3, 7),
    }  # fmt: skip
    return (f"attention={name}", *tiny, *task, *(f"{key}={rng.choice(values)}" for key, values in drawn.items()))


def _throw(
    forge: Forge, config: dict[str, Any], folder: Path, kills: list[tuple[str, float]], expected: Any
) -> Iterator[tuple[str, str]]:
    for by, after in kills:
        code, _ = forge.train(config, folder, by, after)
        # Ctrl-C and the like before the handlers stand are Python's own
        if code not in (0, CODES[by], -getattr(signal, by)):
            yield "raw", f"{by} after {after:.3f} s ended with {code}"
    code, took = forge.train(config, folder)
    if code != 0:
        yield "lost", f"the last call ended with {code}"
        return
    if took > LIMIT_SECONDS:
        yield "hung", f"the last call took {took:.0f} s"
    found = left_by(folder)
    for name, value in expected.items():
        if found[name] != value:
            yield "wrong", f"{name} differs"
    if rest := [path.name for path in folder.glob(".*.????????")]:
        yield "orphan", f"temporary files {rest}"


def left_by(folder: Path) -> dict[str, Any]:
    """What a run has left, but for times."""
    row = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if "per_second" not in name} for line in lines]
    return {name: row[name] for name in SAME} | {"lines": lines}


if __name__ == "__main__":
    serve()
