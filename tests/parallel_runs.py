"""Whole runs of several processes, some of them cut off: `python tests/parallel_runs.py RUNS OUTPUT`.

RUNS is a JSON list of {name, processes, words, folder, ...}, done one after the other by forked processes; OUTPUT gets
{name: [what each rank found]}. `cut` is {rank, step, how}: a signal that a rank (null: every one) gets when it begins
that step, or with `calls` when it has called so many Python functions since; or {rank, after, how}: so many seconds
after it has begun. `damage` names what is done to the folder before. `refuse` is {rank, calls}: that rank alone cannot
do a block's call of that number, and lives on for `STAYS_S` when it has said so. `late_s` is how much longer than the
others rank 0 takes to meet them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_processes import LIMIT_S, TINY, forked, started, warm, write_texts

KEPT = (
    "status", "error", "steps", "curve", "quality_curve", "metrics", "evaluations", "loss_by_position", "by_group",
    "resumed_at", "stopped", "parameters", "readings", "notices", "id", "model_sha256", "given", "refused",
)  # fmt: skip
REFUSAL = "kernel='blocks' cannot run here: this shard's rows do not begin at a block"
STAYS_S = 8.0


def one(run: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """In one process of several, or in one alone: how the run ended here."""
    from attention_zoo import stopping
    from attention_zoo.training.run import run_training
    from attention_zoo.training.trainer import Trainer

    cut, rank = run.get("cut"), int(os.environ.get("RANK", "0"))
    stopping.install()
    if cut is not None and cut["rank"] in (rank, None):
        step = Trainer.step

        if "after" in cut:
            timer = threading.Timer(cut["after"], os.kill, (os.getpid(), getattr(signal, cut["how"])))
            timer.daemon = True
            timer.start()

        def reached(self: Trainer) -> Any:
            if self.done == cut.get("step"):
                if "calls" in cut:
                    sys.setprofile(after_calls(cut["calls"], cut["how"]))
                else:
                    os.kill(os.getpid(), getattr(signal, cut["how"]))
                if cut["how"] == "SIGSTOP":
                    time.sleep(1)
            taken = step(self)
            Path(f"{run['folder']}.done").write_text(str(self.done))
            return taken

        Trainer.step = reached  # type: ignore[method-assign]
    refuses = "refuse" in run and run["refuse"]["rank"] == rank
    if refuses:
        refusing(run["refuse"]["calls"])
    met = list[float]()
    if "late_s" in run and rank == 0:
        late(run["late_s"], met)
    began = time.monotonic()
    try:
        row = run_training(config, run["folder"])
    except stopping.Stopped as stopped:
        return {"status": str(stopped), "seconds": time.monotonic() - began}
    ended = time.monotonic()
    if refuses:
        time.sleep(STAYS_S)
    return {name: row.get(name) for name in KEPT} | {"seconds": ended - began, "ended": ended, "met": met}


def late(seconds: float, met: list[float]) -> None:
    """torch's meeting takes so much longer in this process; `met` gets the time at which it was over."""
    from torch import distributed

    meet = distributed.init_process_group

    def slowly(*given: Any, **named: Any) -> None:
        meet(*given, **named)
        time.sleep(seconds)
        met.append(time.monotonic())

    distributed.init_process_group = slowly


def refusing(calls: int) -> None:
    """Blocks raise as a kernel that is asked for by name and does not run on some shard; by 0 calls, the device is none
    of this process's machine."""
    from attention_zoo.model.block import Block
    from attention_zoo.training import together

    if not calls:

        def of_no_device(asked: object) -> str:
            raise ValueError(REFUSAL)

        together.device_of = of_no_device
        return
    forward, left = Block.forward, [calls]

    def called(self: Any, *given: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise ValueError(REFUSAL)
        return forward(self, *given, **named)

    Block.forward = called  # type: ignore[method-assign]


def after_calls(count: int, how: str) -> Any:
    """A profile function that sends a signal: at moments that are anywhere, and the same on every machine."""
    left = [count]

    def called(_frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            left[0] -= 1
            if not left[0]:
                sys.setprofile(None)
                os.kill(os.getpid(), getattr(signal, how))

    return called


def damaged(folder: Path, kind: str) -> None:
    """Do to a run's checkpoint what a disk or a kill may do."""
    newest = folder / "checkpoint.processes"
    tensors = sorted(newest.glob("*.safetensors"))[-1]
    if kind == "torn":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif kind == "state":
        state = newest / "state.json"
        state.write_text(state.read_text()[: state.stat().st_size // 2])
    elif kind == "missing":
        tensors.unlink()
    elif kind == "renaming":  # killed between the two renames
        shutil.rmtree(folder / "checkpoint.processes.before", ignore_errors=True)
        newest.rename(folder / "checkpoint.processes.before")
    else:  # killed while it is written
        assert kind == "half", kind
        half = folder / ".checkpoint.processes.0123abcd.d"
        half.mkdir()
        (half / tensors.name).write_bytes(tensors.read_bytes()[:100])


class Planned:
    """Runs over the same texts, in folders of their own.

    Args:
        words: of all of them.
    """

    def __init__(self, place: Path, words: Sequence[str]):
        self.place, self.runs = place, list[dict[str, Any]]()
        self.words = [*words, f"task.path={write_texts(place / 'text', 109, 36)}"]

    def add(self, name: str, processes: int, folder: str, *words: str, **more: Any) -> None:
        where = str(self.place / folder)
        self.runs.append(
            {"name": name, "processes": processes, "words": [*self.words, *words], "folder": where, **more}
        )

    def done(self) -> dict[str, list[dict[str, Any]]]:
        """How each run ended, rank by rank."""
        return rows(self.runs, self.place)


def main() -> None:
    import torch

    from attention_zoo.training.config import compose_training

    torch.set_num_threads(1)
    warm()
    runs = json.loads(Path(sys.argv[1]).read_text())
    configs: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for run in runs:
        key = json.dumps(run["words"])
        configs[key] = configs.get(key) or compose_training([*TINY, *run["words"]])

        def work(_: Any, run: Any = run, key: str = key) -> Any:
            return one(run, configs[key])

        if "damage" in run:
            damaged(Path(run["folder"]), run["damage"])
        # one that is stopped for ever ends when the others have told of it
        ended = forked(run["processes"], work, join=False, timeout_s=run.get("left_s", LIMIT_S))
        found[run["name"]] = [each.get("value", each) for each in ended]
        Path(sys.argv[2]).write_text(json.dumps(found))


def rows(runs: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """How each run ended, rank by rank."""
    return started(Path(__file__), runs, folder)


if __name__ == "__main__":
    main()
