"""What a run leaves in its folder: its row, which rows are kept, and what may stand in the way."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

from attention_zoo import registry
from attention_zoo.files import Damaged, read_json
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.environment import environment
from attention_zoo.results.check import wrong_to_keep
from attention_zoo.results.row import OfSet, Rates, Row, Trained, TrainingRow
from attention_zoo.statistics.resampled import interval_over_rows
from attention_zoo.tasks.task import Task
from attention_zoo.training.checking import figure
from attention_zoo.training.evaluate import Evaluation
from attention_zoo.training.fit import History

RESULT, METRICS, CHECKPOINT, BEFORE, MODEL, ERROR = (
    "result.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.before.pt", "model.safetensors", "error.txt",
)  # fmt: skip
FOLDER, FOLDER_BEFORE = "checkpoint.processes", "checkpoint.processes.before"
"""Folders: checkpoints of several processes."""
FILES = (RESULT, METRICS, CHECKPOINT, BEFORE, MODEL, ERROR)
KEPT = ("ok", "unsupported", "oom", "timeout", "failed")
"""Statuses that another try would only repeat. A run that was `lost` (killed from outside) is trained again."""
RETRIED = ("oom", "timeout", "failed")
"""Statuses that `retry=failed` tries again nevertheless."""


def blank_row(config: Mapping[str, Any]) -> TrainingRow:
    """The row of a run of which nothing is known yet. What is none of a config's values is there as it was given."""
    return {
        "kind": "quality",
        "id": None,
        "backend": cast(str, config.get("backend")),
        "status": "ok",
        "error": None,
        "final": True,
        "notices": [],
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
        "readings": {},
        "metrics": {},
        "evaluations": {},
        "loss_by_position": [],
        "metric": None,
        "better": None,
        "by_group": {},
        "chance": None,
        "baselines": {},
        "further_baselines": {},
        "carries_state": None,
        "stopped": None,
        "resumed_at": None,
        "data": None,
        "model_sha256": None,
        "refused": False,
        "wall_seconds": None,
        "scoring_seconds": None,
        "by_set": {},
        "evaluation_tokens_per_second": None,
        "given": None,
        "regime": cast(str, config.get("regime")),
        "rates": rates_of(config),
        "sent_bytes_per_token": None,
    }


def rates_of(config: Mapping[str, Any]) -> Rates | None:
    """What a run's config says of the learning rates that were tried before it."""
    tried, optimizer = config.get("rates"), config.get("optimizer")
    if not isinstance(tried, list) or not isinstance(optimizer, Mapping):
        return None
    return {"tried": list(tried), "chosen": optimizer["lr"], "judged_on": "validation"}


def options_given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The mechanism's options that are not its defaults; of a stack of several, and around it, what was asked for."""
    asked = config.get("attention")
    found: dict[str, Any] = {key: config[key] for key in ("hybrid",) if config.get(key)}
    if found or not isinstance(asked, Mapping):
        return found
    options = {key: value for key, value in asked.items() if key not in ("name", "_target_", "_partial_")}
    name = asked["name"] if "name" in asked else resolve_name(asked["_target_"]).name
    defaults = registry.options_of(str(name))
    return {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}


def trained(
    history: History,
    evaluations: Mapping[str, Evaluation],
    *,
    steps: int,
    seq_len: int,
    parameters: int,
    carries_state: bool,
    model_sha256: str | None,
    task: Task,
    scoring_seconds: float,
) -> Trained:
    """What a run that is through adds to its row.

    Args:
        evaluations: of each set after the last step. The result is that on "test", or on the first without one.
        task: whose metric and baselines stand beside the result.
    """
    main = evaluations.get("test") or next(iter(evaluations.values()))
    return {
        "steps": steps,
        "parameters": parameters,
        "train_seconds": history.train_seconds,
        "wall_seconds": history.seconds,
        "scoring_seconds": scoring_seconds,
        "step_seconds": history.train_seconds / steps,
        "tokens_per_second": history.tokens / history.train_seconds,
        "peak_bytes": history.peak_bytes,
        "sent_bytes_per_token": history.sent_bytes / history.tokens,
        "curve": history.curve,
        "quality_curve": history.quality,
        "readings": history.readings,
        "metrics": main.metrics,
        "evaluations": {name: each.metrics for name, each in evaluations.items()},
        "loss_by_position": main.loss_by_position,
        "metric": task.metric,
        "better": task.better,
        "by_group": main.by_group,
        "by_set": {name: _of_set(each, task) for name, each in evaluations.items()},
        "evaluation_tokens_per_second": main.tokens_per_second,
        "chance": figure(task, "chance", task.chance(seq_len)),
        "baselines": task.baselines(seq_len),
        "further_baselines": task.further_baselines(seq_len),
        "carries_state": carries_state,
        "stopped": history.stopped,
        "model_sha256": model_sha256,
    }


def _of_set(found: Evaluation, task: Task) -> OfSet:
    """How long its rows are, what it says by groups and by position, and how far it would go with other rows."""
    interval = None
    if task.metric in task.score(1.0, 1.0):  # "exact_match" is no score of single answers
        interval = interval_over_rows(found.by_row.numpy(), lambda loss, hits: task.score(loss, hits)[task.metric])
    return {
        "seq_len": found.seq_len, "by_group": found.by_group, "loss_by_position": found.loss_by_position,
        "rows": len(found.by_row), "interval": None if interval is None else list(interval),
    }  # fmt: skip


def lost_row(config: Mapping[str, Any], identity: str | None, ended: Ended, *, task: str, data: Any) -> TrainingRow:
    """The row of a run whose process has left none.

    Args:
        task: its name.
        data: what it says of its data.
    """
    return {
        "kind": "quality", "id": identity, "backend": config["backend"], "status": ended.status, "error": ended.reason,
        "environment": environment(), "config": dict(config), "task": task, "data": data,
        "seed": config["seed"], "seq_len": config["seq_len"], "batch": config["batch"],
    }  # fmt: skip


def read_row(path: str | Path) -> Row:
    """The row that a run has left.

    Raises:
        Damaged: if it holds something else.
        FileNotFoundError: if there is nothing.
    """
    row = read_json(path)
    if (wrong := wrong_to_keep(row, "quality")) is not None:
        raise Damaged(f"{path} is no row of a training: {wrong}")
    return row


def kept_row(
    folder: str | Path,
    identity: str,
    data: Any,
    *,
    retry: str | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Row | None:
    """The row of an earlier run of the same identity over the same data, if it still stands.

    Args:
        folder: of the run.
        identity: of the run, see `run_identity`.
        data: what the task says of its data.
        retry: "failed" tries `RETRIED` again.
        notice: told in one line why a row that is there cannot be taken.
    """
    path = Path(folder) / RESULT
    try:
        row = read_row(path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        notice(f"{error}; runs again")
        return None
    status = row.get("status")
    if row.get("id") != identity or row.get("data") != data or status not in KEPT or row.get("final") is False:
        return None
    if status in RETRIED and (retry == "failed" or row.get("refused")):
        return None  # to refuse once more costs nothing, and what was missing may be there now
    if status == "ok":
        model = Path(folder) / MODEL
        digest = digest_of(model)
        if digest is None or digest != row.get("model_sha256"):
            wrong = "is missing" if digest is None else "is not the file that the run wrote (its SHA-256 differs)"
            notice(f"{model} {wrong}; runs again from its last checkpoint")
            return None
    return row


def digest_of(path: str | Path) -> str | None:
    """SHA-256 of a file in hexadecimal digits; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def check_places(folder: str | Path) -> None:
    """Refuse a folder in which something that is no file has the name of a file of ours.

    Raises:
        Damaged: naming it and how to go on.
    """
    for name in FILES:
        path = Path(folder) / name
        if os.path.lexists(path) and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise Damaged(f"{path} is {kind}, where a run keeps a file; move it away, or use force=true")
    for name in (FOLDER, FOLDER_BEFORE):
        path = Path(folder) / name
        if os.path.lexists(path) and not path.is_dir():
            raise Damaged(f"{path} is no folder, where a run keeps one; move it away")


def clear(folder: str | Path, notice: Callable[[str], None]) -> None:
    """Start clean: files of earlier runs go. A folder that has the name of one is moved aside: it is not ours.

    Args:
        folder: of the run; its lock must be held.
        notice: told in one line about what was moved aside.
    """
    for name in FILES:
        path = Path(folder) / name
        if path.is_dir() and not path.is_symlink():
            aside = next(p for n in range(1, 10**6) if not os.path.lexists(p := path.with_name(f"{name}.aside-{n}")))
            shutil.move(path, aside)
            notice(f"{path} was a folder: it is {aside.name} now")
        else:
            path.unlink(missing_ok=True)
    for name in (FOLDER, FOLDER_BEFORE):
        shutil.rmtree(Path(folder) / name, ignore_errors=True)
