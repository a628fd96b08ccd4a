"""How a run ended, in one line for people and rows."""

from __future__ import annotations

import sys
from pathlib import Path

from attention_zoo.parallel.launched import launched
from attention_zoo.results.row import Row
from attention_zoo.training.trainer import NotFinite


def line_of(error: BaseException) -> str:
    """One line for the row; the type is told where the text alone is no sentence of ours."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception whose own text fails is still this run's result
        text = "no message"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return text if isinstance(error, ValueError | NotFinite) and text else f"{type(error).__name__}: {text}"[:500]


def report_line(row: Row, folder: str | Path) -> str:
    """How a run ended, for people."""
    name = f"{row['backend']} {row['task'] or ''}".strip()
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['error']}"
    figures = ", ".join(f"{metric} {value:.4f}" for metric, value in row["metrics"].items())
    return f"{name}: {figures}, {row['train_seconds']:.1f} s of training, in {folder}"


def show(row: Row, folder: str | Path) -> bool:
    """Print `report_line`, on standard error where it went wrong; whether it went well.

    Of several processes the first speaks, and another where it has failed by itself.
    """
    ok, process = row["status"] == "ok", launched()
    if process.first:
        print(report_line(row, folder), file=sys.stdout if ok else sys.stderr, flush=True)
    elif not (ok or row["refused"]):
        print(f"process {process.rank} of {process.size}: {report_line(row, folder)}", file=sys.stderr, flush=True)
    return ok
