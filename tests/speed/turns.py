"""Training steps of two checkouts in turns, by configurations of committed rows: `python -m tests.speed.turns --help`.

A machine that others share may take half as long again from one minute to the next; what two checkouts take within the
same second still tells which is faster. Each configuration once, one thread; what counts is the lower quartile of four
turns of six steps. A row holds both, and the seconds of all trainings of that configuration as they were recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDES = ("before", "after")
WARM, TURNS, STEPS = 4, 4, 6


def configurations(files: list[Path]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What is said of each in a row, and the configuration; lessons are left out, whose rows are shorter."""
    for file in files:
        found: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
        for row in map(json.loads, file.read_text().splitlines()):
            if row["kind"] != "quality" or row["status"] != "ok":
                continue
            said = {name: row[name] for name in ("task", "seq_len", "batch", "steps", "backend")}
            rows = {"rows": file.parent.name, **said, "trainings": 0, "wall_seconds": 0.0}
            about, _ = found.setdefault(tuple(said.values()), (rows, row["config"]))
            about["trainings"] += 1
            about["wall_seconds"] += row["wall_seconds"]
        for about, config in found.values():
            if "lessons" in config["task"]:
                config["task"]["lessons"] = 0
            yield about, {**config, "device": "cpu"}


def serve(checkout: str) -> None:
    """A worker: builds the configuration that a line holds, or takes as many steps as it says and tells their times."""
    sys.path.insert(0, checkout)
    import torch

    from attention_zoo.parallel.world import World
    from attention_zoo.training.assembly import assemble
    from attention_zoo.training.building import build
    from attention_zoo.training.config import check, options_of
    from attention_zoo.training.heap import keep_freed
    from attention_zoo.training.models import mechanism_of

    torch.set_num_threads(1)
    keep_freed()
    answers, trainer = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)
    for line in sys.stdin:
        asked, times = json.loads(line), list[float]()
        if isinstance(asked, int):
            assert trainer is not None
            for _ in range(asked):
                began = time.perf_counter()
                trainer.step()
                times.append(time.perf_counter() - began)
        else:
            options = options_of(check(asked))
            torch.manual_seed(0)
            trainer = assemble(options, mechanism_of(options), build(options.task, "task"), World()).trainer
        print(json.dumps(times), file=answers, flush=True)


def started(checkout: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", str(checkout)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout)


def answer(worker: subprocess.Popen[str], asked: Any) -> Any:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(json.dumps(asked), file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout; this one comes after it")
    parser.add_argument("rows", type=Path, nargs="+", help="results.jsonl of trainings")
    parser.add_argument("--output", type=Path, required=True, help="JSONL: one row of each configuration")
    given = parser.parse_args()
    workers = dict(zip(SIDES, map(started, (given.before.resolve(), Path(__file__).resolve().parents[2]))))
    with given.output.open("w") as out:
        for about, config in configurations(given.rows):
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            for worker in workers.values():
                answer(worker, config)
                answer(worker, WARM)
            for _ in range(TURNS):
                for side, worker in workers.items():
                    times[side] += answer(worker, STEPS)
            quartiles = {f"{side}_seconds": sorted(each)[len(each) // 4] for side, each in times.items()}
            print(json.dumps(about | quartiles), file=out, flush=True)
            print(about["rows"], about["task"], about["backend"], quartiles)
    for worker in workers.values():
        worker.terminate()


if __name__ == "__main__":
    main()
