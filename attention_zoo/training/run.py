"""One training run from a plain config to one result row, whatever happens on the way.

    row = run_training(compose_training(["attention=longformer", "task=mqar"]), "runs/my-run")

The folder holds result.json (the row), metrics.jsonl, checkpoint.pt, model.safetensors (for `zoo.load`) and, where it
went wrong, error.txt with the traceback. A run that has finished is not run again, one that was cut off goes on from
its checkpoint and ends with the same weights, bit for bit on a CPU. One process works in a folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from attention_zoo.contract import Unsupported
from attention_zoo.files import Damaged, plain, read_json, remove_leftovers, safe_name, write_atomic, write_row
from attention_zoo.locks import owning
from attention_zoo.measure.ends import ran_out_of_memory
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.identity import identity
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.saved import save as save_model
from attention_zoo.options import WrongOption, calls_of
from attention_zoo.stopping import Stopped, graceful
from attention_zoo.tasks.task import Task
from attention_zoo.tracking import Guarded, JsonlTracker, NoTracker, RunInfo, Tracker, Trackers
from attention_zoo.training.checkpoint import CheckpointError, OtherRun, foreign, load_checkpoint, save_checkpoint
from attention_zoo.training.config import check, device_of
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.fit import History, fit
from attention_zoo.training.precision import Precision
from attention_zoo.training.progress import Progress
from attention_zoo.training.records import (
    CHECKPOINT,
    ERROR,
    MODEL,
    RESULT,
    RETRIED,
    blank_row,
    check_places,
    clear,
    digest_of,
    kept_row,
)  # fmt: skip
from attention_zoo.training.seed import contained, random_state, restore_random_state, seed_all
from attention_zoo.training.trainer import NotFinite, Trainer

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


def run_training(config: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Train and evaluate one model.

    Whatever the run sets for the whole process (threads, generators, torch's defaults) is as before when it returns.

    Args:
        config: composed conf/train.yaml as plain values, see `compose_training`.
        folder: of this run alone.

    Returns:
        the result row, kind "quality". Its status is "ok", "oom", "unsupported" or "failed", with the reason in one
        line; only interrupts are raised (`stopping.Stopped` with everything saved). The row is in the folder too,
        except where nothing may or can be written there: another process works in it, or the disk refuses.
    """
    folder, row = Path(folder), blank_row(config)
    with contained():
        try:
            with owning(folder):
                remove_leftovers(folder)
                return _Run(config, folder, row).recorded()
        except (OSError, ValueError, NotImplementedError) as error:  # no lock: busy, read-only, no folder, no flock
            return row | {"status": "failed", "error": _line(error), "final": False}


def build(config: Mapping[str, Any], group: str = "", /, **given: Any) -> Any:
    """What a `_target_` stands for, with run-time values added; its own errors, not Hydra's wrapping of them.

    Args:
        group: that the config is of, for errors: they name options by their full keys.
    """
    made = instantiate({**config, "_partial_": True, "_convert_": "all"})
    try:
        return made(**given)
    except ValueError as error:
        if not group or type(error) not in (ValueError, WrongOption):
            raise
        raise ValueError(full_key(str(error), group, made.func, given)) from error


def full_key(text: str, group: str, target: Any, given: Mapping[str, Any]) -> str:
    """An error of a component in which the option that it begins with has its full key."""
    name = re.match(r"\w*", text)[0]  # type: ignore[index]
    own = {option for call in calls_of(target) for option in call.rules} - given.keys()
    mechanism = getattr(given.get("attention"), "func", None)
    if name in own:
        return f"{group}.{text}"
    if mechanism is not None and name in {option for call in calls_of(mechanism) for option in call.rules}:
        return f"attention.{text}"
    return text if text.startswith(group) else f"{group}: {text}"


class _Run:
    """One run, by the owner of its folder."""

    def __init__(self, config: Mapping[str, Any], folder: Path, row: dict[str, Any]):
        self.config, self.folder, self.row = config, folder, row
        self.progress = Progress(str(row["backend"]), 0, "none")
        self.follower: Tracker | None = None

    def recorded(self) -> dict[str, Any]:
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
        self._write()
        if self.follower is None:
            self.follower = self._follow_failure()
        self.follower.result(self.row)
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
            self.row |= {"status": "failed", "error": f"{_line(error)}{known}", "final": False}

    def _holds_figures(self) -> bool:
        """Whether the folder has the figures of this very run, finished before."""
        try:
            old = read_json(self.folder / RESULT)
        except (FileNotFoundError, Damaged):
            return False
        return old.get("status") == "ok" and old.get("id") == self.row["id"]

    def _failed(self, error: BaseException) -> None:
        status = "oom" if ran_out_of_memory(error) else "unsupported" if isinstance(error, Unsupported) else "failed"
        outside = isinstance(error, CheckpointError | Damaged | OSError)
        self.row |= {"status": status, "error": _line(error), "final": not outside}
        try:
            write_atomic(self.folder / ERROR, "".join(traceback.format_exception(error)))
        except OSError as unwritten:
            self.progress.warn(f"no traceback kept: {_line(unwritten)}")

    def _run(self) -> dict[str, Any] | None:
        """The row of an earlier run; None where this one has run, and its row is filled."""
        full, row = check(self.config), self.row
        self.progress = progress = Progress(str(full["backend"]), full["steps"], full["trainer"]["progress"])
        if full["force"]:
            clear(self.folder, progress.warn)
        else:
            check_places(self.folder)
        if full["threads"] is not None:
            torch.set_num_threads(full["threads"])
        row |= {"id": run_identity(full), "config": full, "environment": environment()}
        row |= {name: full[name] for name in ("seed", "seq_len", "batch")}
        task = build(full["task"], "task")
        row["task"] = task.name
        progress.label = f"{full['backend']} {task.name}"
        task.check(full["seq_len"])
        row["data"] = json.loads(json.dumps(plain(task.describe(full["seq_len"]))))
        old = kept_row(self.folder, row["id"], row["data"], retry=full["retry"], notice=progress.warn)
        if old is not None:
            _say_kept(old, progress)
            return old
        self.follower = self._follow(full)
        row |= self._train(full, task)
        (self.folder / ERROR).unlink(missing_ok=True)
        return None

    def _train(self, config: dict[str, Any], task: Task) -> dict[str, Any]:
        row, folder, progress = self.row, self.folder, self.progress
        options, device = config["trainer"], device_of(config["device"])
        seed_all(config["seed"])
        mechanism = _mechanism(config)
        model = build(
            config["model"],
            "model",
            attention=mechanism,
            vocab=task.vocab,
            causal=task.causal,
            head=task.head,
            seed=config["seed"],
        ).to(device)
        row["backend"] = config["backend"] or _name_of(mechanism)
        progress.label = f"{row['backend']} {task.name}"
        carry = bool(options["carry_state"] and task.streams and model.carries)
        precision = Precision(options["precision"], device)
        trainer = Trainer(
            model,
            optimizer=build(config["optimizer"], "optimizer", model=model),
            schedule=build(config["schedule"], "schedule", steps=config["steps"]),
            batches=task.train_batches(config["batch"], config["seq_len"], config["seed"]),
            accumulate=options["accumulate"],
            clip=options["clip"],
            precision=precision,
            carry=carry,
            device=device,
        )
        sets = task.evaluation_sets(config["batch"], config["seq_len"])
        main = next(iter(sets))
        history, path = History(), folder / CHECKPOINT
        _resume(path, row, trainer, history, progress)
        figures = JsonlTracker(self._info(config))
        assert self.follower is not None
        tracker = Trackers([figures, self.follower])
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()

        def save() -> None:
            history.peak_bytes = _peak_bytes(history, device)
            content = {"identity": row["id"], "data": row["data"], "trainer": trainer.state_dict()}
            content |= {"history": history.state_dict(), "random": random_state(), "lines": figures.lines}
            save_checkpoint(path, content)

        with progress, graceful() as asked:

            def score(name: str) -> Evaluation | None:
                return evaluate(model, task, sets[name], precision=precision, device=device, carry=carry, stop=asked)

            last = fit(
                trainer,
                history,
                task=task,
                steps=config["steps"],
                options=options,
                evaluate=lambda: score(main),
                save=save,
                tracker=tracker,
                progress=progress,
                asked=asked,
            )
            evaluations: dict[str, Evaluation] = {}
            for name in sets:
                found = last if name == main else score(name)
                if found is None:
                    by = asked()
                    assert by is not None
                    raise Stopped(by)
                evaluations[name] = found
        save_model(model, folder / MODEL)
        for name, result in evaluations.items():
            if name != main:
                tracker.log({f"evaluate/{name}_{k}": v for k, v in result.metrics.items()}, trainer.done)
        return {
            "steps": trainer.done,
            "parameters": parameter_count(model),
            "train_seconds": history.train_seconds,
            "step_seconds": history.train_seconds / trainer.done,
            "tokens_per_second": history.tokens / history.train_seconds,
            "peak_bytes": _peak_bytes(history, device),
            "curve": history.curve,
            "quality_curve": history.quality,
            "metrics": last.metrics,
            "evaluations": {name: result.metrics for name, result in evaluations.items()},
            "loss_by_position": last.loss_by_position,
            "carries_state": carry,
            "stopped": history.stopped,
            "model_sha256": digest_of(folder / MODEL),
        }

    def _info(self, config: Mapping[str, Any]) -> RunInfo:
        row = self.row
        unnamed = hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]
        return RunInfo(
            folder=self.folder,
            name=f"{row['task'] or 'refused'}-{row['backend']}-s{row['seed']}",
            identity=row["id"] or unnamed,
            backend=str(row["backend"]),
            sweep=f"{row['task'] or 'refused'}-{row['seq_len']}",
            config=config,
            notice=self.progress.warn,
        )

    def _follow(self, config: Mapping[str, Any]) -> Tracker:
        return Guarded(build(config["tracker"], info=self._info(config)), self.progress.warn)

    def _follow_failure(self) -> Tracker:
        """The tracker of a run that failed before it had one: who follows a sweep shall see those too."""
        tracker = self.row["config"].get("tracker")
        if not (isinstance(tracker, Mapping) and isinstance(tracker.get("_target_"), str)):
            return NoTracker(self._info(self.row["config"]))
        try:
            return self._follow(self.row["config"])
        except Exception as error:  # of the tracker itself, which may be why the run failed
            if _line(error) not in self.row["error"]:
                self.progress.warn(f"the tracker does not start: {_line(error)}")
            return NoTracker(self._info(self.row["config"]))


def _say_kept(row: Mapping[str, Any], progress: Progress) -> None:
    if row["status"] == "ok":
        progress.notice("finished before; force=true runs it again")
    else:
        cure = "retry=failed" if row["status"] in RETRIED else "force=true"
        progress.warn(f"ended so before: {row['status']}; {cure} runs it again")


def _peak_bytes(history: History, device: str) -> int | None:
    return None if device == "cpu" else max(history.peak_bytes or 0, torch.cuda.max_memory_allocated())


def _mechanism(config: Mapping[str, Any]) -> Any:
    """The model's `attention`: the group's partial, or a hybrid stack's list of names and mappings."""
    if config["hybrid"]:
        return list(config["hybrid"])
    chosen = config["attention"]
    if isinstance(chosen, Mapping) and "_target_" in chosen:
        return instantiate({**chosen, "_partial_": True, "_convert_": "all"})
    return chosen


def _name_of(mechanism: Any) -> str:
    if isinstance(mechanism, list):
        return "+".join(_name_of(one) for one in mechanism)
    if isinstance(mechanism, Mapping):
        return str(mechanism["name"])
    return getattr(getattr(mechanism, "func", None), "name", str(mechanism))


def _resume(path: Path, row: dict[str, Any], trainer: Trainer, history: History, progress: Progress) -> None:
    """Go on from the checkpoint, where there is one of this run."""
    step, lines, steps = 0, None, row["config"]["steps"]
    if path.exists():
        try:
            content = load_checkpoint(path, row["id"])
            if json.dumps(plain(content.get("data"))) != json.dumps(row["data"]):
                raise OtherRun(f"{path} was trained on other data")
        except OtherRun as other:
            progress.notice(f"{other}: starts afresh")
        else:
            try:
                trainer.load_state_dict(content["trainer"], path)
                history.load_state_dict(content["history"])
                restore_random_state(content["random"])
                lines = int(content["lines"])
                if trainer.done > steps or not 0 <= trainer.done - history.settled <= 1 or lines < 0:
                    raise ValueError(f"step {trainer.done} of {steps}, settled {history.settled}, {lines} lines")
            except CheckpointError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                if ran_out_of_memory(error):
                    raise
                raise foreign(path, f"it does not fit this run ({type(error).__name__}: {error})") from None
            step = row["resumed_at"] = trainer.done
            progress.notice(f"had ended: {history.stopped}" if history.stopped else f"goes on after step {step}")
    JsonlTracker.rewind(path.parent, step, lines, on_bad=progress.warn)


def _line(error: BaseException) -> str:
    """One line for the row; the type is told where the text alone is no sentence of ours."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception whose own text fails is still this run's result
        text = "no message"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return text if isinstance(error, ValueError | NotFinite) and text else f"{type(error).__name__}: {text}"[:500]


def report_line(row: Mapping[str, Any], folder: str | Path) -> str:
    """How a run ended, for people."""
    name = f"{row['backend']} {row['task'] or ''}".strip()
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['error']}"
    figures = ", ".join(f"{metric} {value:.4f}" for metric, value in row["metrics"].items())
    return f"{name}: {figures}, {row['train_seconds']:.1f} s of training, in {folder}"


def show(row: Mapping[str, Any], folder: str | Path) -> bool:
    """Print `report_line`, on standard error where it went wrong; whether it went well."""
    ok = row["status"] == "ok"
    print(report_line(row, folder), file=sys.stdout if ok else sys.stderr, flush=True)
    return ok
