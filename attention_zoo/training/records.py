"""What a run leaves in its folder: its row, which rows are kept, and what may stand in the way."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_json

RESULT, METRICS, CHECKPOINT, MODEL, ERROR = (
    "result.json", "metrics.jsonl", "checkpoint.pt", "model.safetensors", "error.txt",
)  # fmt: skip
KEPT = ("ok", "unsupported", "oom", "timeout", "failed")
"""Statuses that another try would only repeat. A run that was `lost` (killed from outside) is trained again."""
RETRIED = ("oom", "timeout", "failed")
"""Statuses that `retry=failed` tries again nevertheless."""


def blank_row(config: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run of which nothing is known yet.

    Fields that need a word:
        model_sha256: of model.safetensors, by which a later call knows that it is still whole.
        final: False where something in the run's surroundings failed (its folder, the disk), so that the next call
            tries again.
        notices: what went otherwise than asked and did not end the run.
    """
    return {
        "kind": "quality",
        "id": None,
        "backend": config.get("backend"),
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
        "metrics": {},
        "evaluations": {},
        "loss_by_position": [],
        "carries_state": None,
        "stopped": None,
        "resumed_at": None,
        "data": None,
        "model_sha256": None,
    }


def kept_row(
    folder: str | Path,
    identity: str,
    data: Any,
    *,
    retry: str | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
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
        row = read_json(path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        notice(f"{error}; runs again")
        return None
    status = row.get("status")
    if row.get("id") != identity or row.get("data") != data or status not in KEPT or row.get("final") is False:
        return None
    if status in RETRIED and retry == "failed":
        return None
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
    for name in (RESULT, METRICS, CHECKPOINT, MODEL, ERROR):
        path = Path(folder) / name
        if os.path.lexists(path) and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise Damaged(f"{path} is {kind}, where a run keeps a file; move it away, or use force=true")


def clear(folder: str | Path, notice: Callable[[str], None]) -> None:
    """Start clean: files of earlier runs go. A folder that has the name of one is moved aside: it is not ours.

    Args:
        folder: of the run; its lock must be held.
        notice: told in one line about what was moved aside.
    """
    for name in (RESULT, METRICS, CHECKPOINT, MODEL, ERROR):
        path = Path(folder) / name
        if path.is_dir() and not path.is_symlink():
            aside = next(p for n in range(1, 10**6) if not os.path.lexists(p := path.with_name(f"{name}.aside-{n}")))
            shutil.move(path, aside)
            notice(f"{path} was a folder: it is {aside.name} now")
        else:
            path.unlink(missing_ok=True)
