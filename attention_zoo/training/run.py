"""One training run from a plain config to one result row, whatever happens on the way.

    row = run_training(compose_training(["attention=longformer", "task=mqar"]), "runs/my-run")

The folder holds result.json (the row), metrics.jsonl, checkpoint.pt and the one before it, model.safetensors (for
`zoo.load`) and, where it went wrong, error.txt with the traceback. A run that has finished is not run again, one that
was cut off goes on from its checkpoint and ends with the same weights, bit for bit on a CPU. One process works in a
folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attention_zoo.contract import Unsupported
from attention_zoo.files import Damaged, plain, safe_name, write_atomic, write_row
from attention_zoo.locks import Busy
from attention_zoo.measure.ends import ran_out_of_memory, was_refused
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.given import given_to
from attention_zoo.measure.identity import identity
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.saved import save as save_model
from attention_zoo.parallel.world import Lost, SaidByOther, World, is_lost
from attention_zoo.results.row import Given, Row, Status, Trained, TrainingRow
from attention_zoo.stopping import Stopped, graceful
from attention_zoo.tasks.task import Task
from attention_zoo.tracking import Guarded, JsonlTracker, NoTracker, RunInfo, Tracker, Trackers
from attention_zoo.tracking.naming import run_name
from attention_zoo.training.assembly import assemble
from attention_zoo.training.building import build
from attention_zoo.training.checking import check_task
from attention_zoo.training.checkpoint import CheckpointError
from attention_zoo.training.config import TrainConfig, check, device_of, options_of
from attention_zoo.training.elsewhere import elsewhere, scored
from attention_zoo.training.fit import History, fit
from attention_zoo.training.heap import keep_freed
from attention_zoo.training.models import mechanism_of, name_of
from attention_zoo.training.observed import observed_step
from attention_zoo.training.progress import Progress, Silent
from attention_zoo.training.records import (
    BEFORE,
    CHECKPOINT,
    ERROR,
    FOLDER,
    FOLDER_BEFORE,
    MODEL,
    RESULT,
    RETRIED,
    blank_row,
    check_places,
    clear,
    digest_of,
    kept_row,
    options_given,
    read_row,
    trained,
)  # fmt: skip
from attention_zoo.training.resume import Places, resume, save
from attention_zoo.training.saying import line_of
from attention_zoo.training.seed import contained, seed_all
from attention_zoo.training.survivors import Unwritten, surviving
from attention_zoo.training.together import folder_of, world_of
from attention_zoo.training.trainer import Trainer
from attention_zoo.words import say

NAME_LIMIT = 60


def run_identity(config: Mapping[str, Any]) -> str:
    """The name of a run's result: of its config, the code, torch, the device and the threads."""
    threads = config.get("threads") or torch.get_num_threads()
    return identity(config, device=device_name(device_of(config.get("device", "auto"))), threads=threads)


def run_folder(config: Mapping[str, Any]) -> Path:
    """Where a run goes unless told otherwise: <output>/<task>-<backend>-<identity>, a function of the config and the
    code, never of the clock."""
    task = config.get("task")
    target = task.get("_target_") if isinstance(task, Mapping) else task
    word = str(target).rpartition(".")[2].lower()
    try:
        name = run_identity(config)
    except (ValueError, TypeError):
        name = "refused"  # a device that is not there: the run will say so
    what = safe_name(f"{word}-{config.get('backend')}", NAME_LIMIT)
    return Path(config["output"]) / f"{what}-{name}"


def run_training(config: Mapping[str, Any], folder: str | Path, *, wait_s: float = 0.0) -> Row:
    """Train and evaluate one model.

    Whatever the run sets for the whole process (threads, generators, torch's defaults) is as before when it returns.

    Args:
        config: composed conf/train.yaml as plain values, see `compose_training`.
        folder: of this run alone.
        wait_s: how long to wait for another process that works in it.

    Returns:
        the result row, kind "quality". Its status is "ok", "oom", "unsupported" or "failed", with the reason in one
        line; only interrupts are raised (`stopping.Stopped` with everything saved). The row is in the folder too,
        except where nothing may or can be written there: another process works in it, or the disk refuses.
    """
    folder, row = Path(folder), blank_row(config)
    with contained():
        try:
            with world_of(config) as world, folder_of(world, folder, wait_s):
                return _Run(config, folder, row, world).recorded()
        except SaidByOther as error:
            return row | {"status": "failed", "error": line_of(error), "final": False, "refused": True}
        except Lost as error:
            return row | {"status": "lost", "error": line_of(error), "final": False}
        except (OSError, ValueError, NotImplementedError) as error:  # no lock: busy, read-only, no folder, no flock
            refused = was_refused(error) and not isinstance(error, Busy)
            return row | {"status": "failed", "error": line_of(error), "final": False, "refused": refused}


class _Run:
    """One run, by the owner of its folder, or by a process that works for it."""

    def __init__(self, config: Mapping[str, Any], folder: Path, row: TrainingRow, world: World):
        self.config, self.folder, self.row, self.world = dict(config), folder, row, world
        self.progress = Progress(str(row["backend"]), 0, "none") if world.first else Silent(str(row["backend"]))
        self.follower: Tracker | None = None
        self.trainer: Trainer | None = None

    def recorded(self) -> Row:
        """Run, and write the row before anything else learns of it."""
        try:
            old = self._run()
            if old is not None:
                return old
        except KeyboardInterrupt:
            if self.follower is not None:
                self.follower.stop()
            raise
        except (Exception, SystemExit) as error:  # whatever goes wrong is this run's result, not the end of a sweep
            self._failed(error)
        finally:
            if self.trainer is not None:
                self.trainer.close()
        if not self.world.first:
            return plain(self.row)
        self._write()
        if self.follower is None:
            self.follower = self._follow_failure()
        self.follower.result(self.row)
        if self.row["status"] == "ok":
            self.follower.model(self.folder / MODEL)
        self.follower.finish(failed=self.row["status"] != "ok")
        if self.progress.warnings != self.row["notices"]:
            self._write()
        return plain(self.row)

    def _write(self) -> None:
        self.row["notices"] = list(self.progress.warnings)
        if not self.row["final"] and self._holds_figures():
            return  # a sound disk or force=true brings the run back: until then its figures stand
        try:
            write_row(self.folder / RESULT, self.row)
        except OSError as error:
            known = f"; before that: {self.row['error']}" if self.row["error"] else ""
            self.row |= {"status": "failed", "error": f"{line_of(error)}{known}", "final": False}

    def _holds_figures(self) -> bool:
        """Whether the folder has the figures of this very run, finished before."""
        try:
            old = read_row(self.folder / RESULT)
        except (FileNotFoundError, Damaged):
            return False
        return old.get("status") == "ok" and old.get("id") == self.row["id"]

    def _failed(self, error: BaseException) -> None:
        world = self.world
        if world.size > 1 and is_lost(error) and not isinstance(error, Lost):
            error = Lost.because(error, world.timeout_s)
        status: Status = "unsupported" if isinstance(error, Unsupported) else "failed"
        status = "oom" if ran_out_of_memory(error) else status
        status = "lost" if isinstance(error, Lost) else status
        outside = isinstance(error, CheckpointError | Damaged | OSError | Lost)
        begun = self.trainer is not None and self.trainer.done > 0
        refused = was_refused(error) and not begun and not isinstance(error, CheckpointError | Damaged)
        own = {"status": status, "error": line_of(error), "final": not outside, "refused": refused}
        self.row |= world.ended(error, own)  # type: ignore[typeddict-item]
        if not world.first:
            if refused and world.spoke:  # `show` leaves to process 0 what all refuse
                say(f"process {world.rank} of {world.size}: {own['error']}")
            return
        try:
            write_atomic(self.folder / ERROR, "".join(traceback.format_exception(error)))
        except OSError as unwritten:
            self.progress.warn(f"no traceback kept: {line_of(unwritten)}")

    def _run(self) -> Row | None:
        """The row of an earlier run; None where this one has run, and its row is filled."""
        full, row = check(self.config), self.row
        options = options_of(full)
        world = self.world
        if world.first:
            self.progress = Progress(str(options.backend), options.steps, options.trainer.progress)
        progress = self.progress
        if options.force:
            world.by_first(lambda: clear(self.folder, progress.warn))
        else:
            world.by_first(lambda: check_places(self.folder))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if device_of(options.device) == "cpu":
            keep_freed()
        self.config, name = full, world.by_first(lambda: run_identity(full))
        row |= {"id": name, "config": full, "environment": environment()}
        if world.size > 1:
            row["environment"] = {**environment(), "processes": world.size}
        row |= {"seed": options.seed, "seq_len": options.seq_len, "batch": options.batch}
        task = build(options.task, "task")
        check_task(task)
        row["task"] = task.name
        progress.label = f"{options.backend} {task.name}"
        task.check(options.seq_len)
        row["data"] = json.loads(json.dumps(plain(task.describe(options.seq_len))))
        data = row["data"]
        old = world.by_first(lambda: kept_row(self.folder, name, data, retry=options.retry, notice=progress.warn))
        if old is not None:
            _say_kept(old, progress)
            return old
        self.follower = self._follow() if world.first else NoTracker(self._info())
        row |= self._train(options, task)
        world.everybody.wait()
        if world.first:
            (self.folder / ERROR).unlink(missing_ok=True)
        return None

    def _train(self, options: TrainConfig, task: Task) -> Trained:
        row, progress = self.row, self.progress
        places = Places(*(self.folder / name for name in (CHECKPOINT, BEFORE, FOLDER, FOLDER_BEFORE)))
        seed_all(options.seed)
        mechanism = mechanism_of(options)
        row["backend"] = options.backend or name_of(mechanism)
        progress.label = f"{row['backend']} {task.name}"
        world, known = self.world, (str(row["id"]), row["data"])
        parts, history = assemble(options, mechanism, task, world), History()
        others = elsewhere(options, parts)
        self.trainer = parts.trainer
        step, lines = resume(places, *known, parts.trainer, history, steps=options.steps, progress=progress)
        row["resumed_at"] = step

        def rewound() -> int:
            JsonlTracker.rewind(self.folder, step or 0, lines, on_bad=progress.warn)
            return JsonlTracker(self._info()).lines

        written = world.by_first(rewound)
        figures = JsonlTracker(self._info()) if world.first else Unwritten(self._info(), written)
        assert self.follower is not None
        tracker = Trackers([figures, self.follower])
        if parts.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

        def save_all() -> None:
            history.peak_bytes = _peak_bytes(history, parts.device)
            save(places, *known, parts.trainer, history, figures.lines)

        kept = surviving(places, *known, parts.trainer, history, figures)
        with progress, graceful() as told, kept:
            asked = world.agreed(told)
            last = fit(
                parts.trainer,
                history,
                task=task,
                steps=options.steps,
                options=options.trainer,
                evaluate=lambda: parts.score(parts.main, asked),
                save=save_all,
                tracker=tracker,
                progress=progress,
                asked=asked,
                step=partial(observed_step, parts.trainer, history) if parts.device == "cpu" else None,
                clocked=world.everybody.shared,
            )
            evaluations, began = {parts.main: last}, time.perf_counter()
            further = ((name, parts.score(name, asked)) for name in list(parts.sets)[1:])
            for name, found in chain(further, scored(others, options, parts, asked)):
                if found is None:
                    by = asked()
                    assert by is not None
                    raise Stopped(by)
                evaluations[name] = found
            scoring_seconds = time.perf_counter() - began
        if row["rates"] is not None:
            row["rates"]["judged_on"] = parts.main
        model = parts.finished()
        row["given"] = self._given(parts.whole(), options)
        world.by_first(lambda: save_model(model, self.folder / MODEL))
        for name, result in list(evaluations.items())[1:]:
            tracker.log({f"evaluate/{name}_{k}": v for k, v in result.metrics.items()}, parts.trainer.done)
        history.peak_bytes = _peak_bytes(history, parts.device)
        return trained(
            history, evaluations, steps=parts.trainer.done, parameters=parameter_count(parts.model),
            carries_state=parts.carry, model_sha256=digest_of(self.folder / MODEL),
            task=task, seq_len=options.seq_len, scoring_seconds=scoring_seconds,
        )  # fmt: skip

    def _given(self, model: nn.Module, options: TrainConfig) -> Given:
        """Facts beside the result, which stands without them: other people's mechanisms may not take such a call."""
        found: Given = {"options": plain(options_given(self.config))}
        try:
            return found | given_to(model, options.seq_len)  # type: ignore[return-value]
        except Exception as error:
            self.progress.warn(f"what the mechanism was given cannot be counted: {line_of(error)}")
            return found

    def _info(self) -> RunInfo:
        return info_of(self.config, self.folder, self.row, self.progress.warn)

    def _follow(self) -> Tracker:
        return Guarded(build(self.config["tracker"], info=self._info()), self.progress.warn)

    def _follow_failure(self) -> Tracker:
        """The tracker of a run that failed before it had one: who follows a sweep shall see those too."""
        tracker = self.config.get("tracker")
        if not (isinstance(tracker, Mapping) and isinstance(tracker.get("_target_"), str)):
            return NoTracker(self._info())
        try:
            return self._follow()
        except Exception as error:  # of the tracker itself, which may be why the run failed
            if line_of(error) not in (self.row["error"] or ""):
                self.progress.warn(f"the tracker does not start: {line_of(error)}")
            return NoTracker(self._info())


def info_of(
    config: Mapping[str, Any], folder: str | Path, row: Mapping[str, Any], notice: Callable[[str], None]
) -> RunInfo:
    """What trackers need to know of a run.

    Args:
        config: as it was asked for, which a run that was refused has, too.
        row: of the run, as far as it is known.
        notice: told what goes wrong.
    """
    unnamed = hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]
    task, backend, identity = row["task"] or "refused", str(row["backend"]), row["id"] or unnamed
    attention = config.get("attention")
    options = attention if isinstance(attention, Mapping) and not config.get("hybrid") else {}
    return RunInfo(
        folder=Path(folder),
        name=run_name(backend, task, row["seq_len"], f"s{row['seed']}", identity=identity, options=options),
        identity=identity,
        backend=backend,
        sweep=f"{Path(str(config.get('output', 'runs'))).name}/{task}",
        config=config,
        notice=notice,
        facts={"task": task, "seq_len": row["seq_len"], "seed": row["seed"]},
    )


def _say_kept(row: Row, progress: Progress) -> None:
    if row["status"] == "ok":
        progress.notice("finished before; force=true runs it again")
    else:
        cure = "retry=failed" if row["status"] in RETRIED else "force=true"
        progress.warn(f"ended so before: {row['status']}; {cure} runs it again")


def _peak_bytes(history: History, device: str) -> int | None:
    return history.peak_bytes if device == "cpu" else max(history.peak_bytes or 0, torch.cuda.max_memory_allocated())
