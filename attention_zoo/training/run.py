"""One training run from a plain config to one result row, whatever happens on the way.

    row = run_training(compose_training(["attention=longformer", "task=mqar"]), "runs/my-run")

The folder holds result.json (the row), metrics.jsonl, checkpoint.pt, model.safetensors (for `zoo.load`) and, where it
went wrong, error.txt with the traceback. A run that has finished is not run again, one that was cut off goes on from
its checkpoint and ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from attention_zoo.contract import Unsupported
from attention_zoo.files import write_atomic, write_json
from attention_zoo.measure.cell import ran_out_of_memory
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.identity import identity
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.saved import save as save_model
from attention_zoo.tasks.task import Task
from attention_zoo.tracking import JsonlTracker, RunInfo, Tracker, Trackers
from attention_zoo.training.checkpoint import OtherRun, load_checkpoint, save_checkpoint
from attention_zoo.training.config import check, device_of
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.fit import History, fit
from attention_zoo.training.precision import Precision
from attention_zoo.training.progress import Progress
from attention_zoo.training.seed import random_state, restore_random_state, seed_all
from attention_zoo.training.trainer import NotFinite, Trainer

FINAL = ("ok", "oom", "unsupported")
"""Statuses that another try would only repeat."""


def run_identity(config: Mapping[str, Any]) -> str:
    """The name of a run's result: of its config, the code, torch, the device and the threads."""
    threads = config.get("threads") or torch.get_num_threads()
    return identity(config, device=device_name(device_of(config.get("device", "auto"))), threads=threads)


def run_folder(config: Mapping[str, Any]) -> Path:
    """Where a run goes unless told otherwise: <output>/<task>-<backend>-<identity>, a function of the config and the
    code, never of the clock."""
    task = str(config["task"]["_target_"]).rpartition(".")[2].lower()
    try:
        name = run_identity(config)
    except ValueError:
        name = "refused"  # a device that is not there: the run will say so
    return Path(config["output"]) / f"{task}-{config['backend']}-{name}"


def run_training(config: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Train and evaluate one model.

    Args:
        config: composed conf/train.yaml as plain values, see `compose_training`.
        folder: of this run alone.

    Returns:
        the result row, kind "quality". Its status is "ok", "oom", "unsupported" or "failed", with the reason in one
        line; only interrupts are raised.
    """
    folder = Path(folder)
    row = _blank(config)
    try:
        full = check(config)
        if full["threads"] is not None:
            torch.set_num_threads(full["threads"])
        row |= {"id": run_identity(full), "config": full, "environment": environment()}
        row |= {name: full[name] for name in ("seed", "seq_len", "batch")}
        task = build(full["task"])
        row["task"] = task.name
        task.check(full["seq_len"])
        row["data"] = task.describe(full["seq_len"])
        if not full["force"] and (finished := _finished(folder, row)) is not None:
            label = f"{finished['backend']} {task.name}"
            Progress(label, full["steps"], full["trainer"]["progress"]).notice(
                "finished before; force=true runs it again"
            )
            return finished
        row |= _train(full, folder, task, row)
        (folder / "error.txt").unlink(missing_ok=True)
    except Exception as error:  # whatever goes wrong is this run's result, not the end of a sweep
        status = "oom" if ran_out_of_memory(error) else "unsupported" if isinstance(error, Unsupported) else "failed"
        row |= {"status": status, "error": _line(error)}
        write_atomic(folder / "error.txt", traceback.format_exc())
    write_json(folder / "result.json", row)
    return row


def build(config: Mapping[str, Any], **given: Any) -> Any:
    """What a `_target_` stands for, with run-time values added; its own errors, not Hydra's wrapping of them."""
    return instantiate({**config, "_partial_": True, "_convert_": "all"})(**given)


def _blank(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "quality",
        "id": None,
        "backend": config.get("backend"),
        "status": "ok",
        "error": None,
        "environment": None,
        "config": dict(config),
        "task": None,
        "seed": config.get("seed"),
        "steps": 0,
        "seq_len": config.get("seq_len"),
        "batch": config.get("batch"),
        "parameters": None,
        "train_seconds": None,
        "step_seconds": None,
        "tokens_per_second": None,
        "peak_bytes": None,
        "curve": [],
        "quality_curve": [],
        "metrics": {},
        "evaluations": {},
        "loss_by_position": [],
        "carries_state": None,
        "stopped": None,
        "resumed_at": None,
        "data": None,
    }


def _finished(folder: Path, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of an earlier run of the same identity over the same data."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        old = json.loads(path.read_text())
        same = old["id"] == row["id"] and old["data"] == row["data"] and old["status"] in FINAL
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is no result row; remove it, or use force=true to run again") from None
    return old if same else None


def _train(config: dict[str, Any], folder: Path, task: Task, row: dict[str, Any]) -> dict[str, Any]:
    options, device = config["trainer"], device_of(config["device"])
    seed_all(config["seed"])
    mechanism = _mechanism(config)
    model = build(
        config["model"],
        attention=mechanism,
        vocab=task.vocab,
        causal=task.causal,
        head=task.head,
        seed=config["seed"],
    ).to(device)
    row["backend"] = config["backend"] or _name_of(mechanism)
    carry = bool(options["carry_state"] and task.streams and model.carries)
    precision = Precision(options["precision"], device)
    trainer = Trainer(
        model,
        optimizer=build(config["optimizer"], model=model),
        schedule=build(config["schedule"], steps=config["steps"]),
        batches=task.train_batches(config["batch"], config["seq_len"], config["seed"]),
        accumulate=options["accumulate"],
        clip=options["clip"],
        precision=precision,
        carry=carry,
        device=device,
    )
    sets = task.evaluation_sets(config["batch"], config["seq_len"])
    main = next(iter(sets))

    def score(name: str) -> Evaluation:
        return evaluate(model, task, sets[name], precision=precision, device=device, carry=carry)

    history, path = History(), folder / "checkpoint.pt"

    def save() -> None:
        content = {"identity": row["id"], "data": row["data"], "trainer": trainer.state_dict()}
        save_checkpoint(path, content | {"history": history.state_dict(), "random": random_state()})

    label = f"{row['backend']} {task.name}"
    with Progress(label, config["steps"], options["progress"]) as progress:
        _resume(config, path, row, trainer, history, progress)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        tracker = _tracker(config, folder, row, progress)
        failed = True
        try:
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
            )
            evaluations = {name: last if name == main else score(name) for name in sets}
            found = {
                "steps": trainer.done,
                "parameters": parameter_count(model),
                "train_seconds": history.train_seconds,
                "step_seconds": history.train_seconds / trainer.done,
                "tokens_per_second": history.tokens / history.train_seconds,
                "peak_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated(),
                "curve": history.curve,
                "quality_curve": history.quality,
                "metrics": last.metrics,
                "evaluations": {name: result.metrics for name, result in evaluations.items()},
                "loss_by_position": last.loss_by_position,
                "carries_state": carry,
                "stopped": history.stopped,
            }
            save_model(model, folder / "model.safetensors")
            for name, result in evaluations.items():
                if name != main:
                    tracker.log({f"evaluate/{name}_{k}": v for k, v in result.metrics.items()}, trainer.done)
            tracker.result(row | found)
            failed = False
        finally:
            tracker.finish(failed=failed)
    return found


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


def _resume(
    config: Mapping[str, Any], path: Path, row: dict[str, Any], trainer: Trainer, history: History, progress: Progress
) -> None:
    """Go on from the checkpoint, where there is one of this run."""
    step = 0
    if path.exists() and not config["force"]:
        try:
            content = load_checkpoint(path, row["id"])
            if content["data"] != row["data"]:
                raise OtherRun(f"{path} was trained on other data")
        except OtherRun as other:
            progress.notice(f"{other}: starts afresh")
        else:
            trainer.load_state_dict(content["trainer"], path)
            for name, value in content["history"].items():
                setattr(history, name, value)
            history.stopped = None
            restore_random_state(content["random"])
            step = row["resumed_at"] = trainer.done
            progress.notice(f"goes on after step {step}")
    JsonlTracker.rewind(path.parent, step)


def _tracker(config: Mapping[str, Any], folder: Path, row: Mapping[str, Any], progress: Progress) -> Tracker:
    info = RunInfo(
        folder=folder,
        name=f"{row['task']}-{row['backend']}-s{row['seed']}",
        identity=row["id"],
        backend=row["backend"],
        sweep=f"{row['task']}-{row['seq_len']}",
        config=config,
        notice=progress.notice,
    )
    return Trackers([JsonlTracker(info), build(config["tracker"], info=info)])


def _line(error: BaseException) -> str:
    """One line for the row; the type is told where the text alone is no sentence of ours."""
    text = " ".join(str(error).split())
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
