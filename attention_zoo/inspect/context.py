"""What the command `context` does: trained language models in, their relative effective context lengths out.

See `measure.relative_context`. Every model reads the same tokens of the same text, which is that of its own test set or
a file, so that positions are equal for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import nn

from attention_zoo.files import read_json, write_json
from attention_zoo.inspect.given import folders_of
from attention_zoo.measure.relative_context import SHARES, THRESHOLD, losses_after, places_for, relative_context
from attention_zoo.model.saved import load
from attention_zoo.model.transformer import Transformer
from attention_zoo.options import Positive, Text, check_fields
from attention_zoo.rules import shown
from attention_zoo.schemas import store
from attention_zoo.training.building import build
from attention_zoo.training.config import device_of

NAME = "context.json"
STEPS = 8
DIGITS = 6
"""Of a loss in the file."""


@dataclass
class ContextConfig:
    """conf/context.yaml.

    Fields:
        run: folders of finished runs over bytes: the group, whose models are baselines of each other.
        text: file that they read; null: the test set of the runs, which must be the same.
        contexts: tokens of context, in rising order; null: eight equal steps up to twice the longest trained length.
        positions: tokens that are asked for, at most, evenly over the text.
        threshold: of the relative gain.
        batch_tokens: tokens of one call, at most: all that is in memory at once.
        device: auto | cpu | cuda.
        output: folder of context.json; null: the first run's.
    """

    run: Any = field(default_factory=list)
    text: Text | None = None
    contexts: list[Positive] | None = None
    positions: Positive = 512
    threshold: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = THRESHOLD
    batch_tokens: Positive = 8192
    device: Text = "auto"
    output: Text | None = None


def register() -> None:
    """Make the schema known to Hydra, which conf/context.yaml names first."""
    store("context_schema", ContextConfig)


@dataclass(frozen=True)
class _Run:
    """One model of the group and what its row says."""

    folder: Path
    name: str
    row: Mapping[str, Any]
    model: nn.Module


def context(config: ContextConfig) -> Path:
    """Measure; returns the path of context.json, and prints the lengths.

    Raises:
        ValueError: for fewer runs than one, models that are no causal ones over bytes, runs over other texts, contexts
            that do not rise, or longer ones than the positions or the documents hold.
        OSError: for a file that cannot be read or written, naming it.
    """
    check_fields(ContextConfig, config)
    device = device_of(config.device)
    folders = folders_of(config.run)
    runs = _named([_open(folder) for folder in folders])
    contexts = _contexts(config, runs)
    text, ends = _text(config, runs)
    places = places_for(ends, contexts[-1], config.positions)
    losses: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        model = run.model.to(device).eval()
        losses[run.name] = {
            each: losses_after(model, text, places, each, batch_tokens=config.batch_tokens) for each in contexts
        }
        model.cpu()
    output = folders[0] if config.output is None else Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    found = _found(config, runs, losses, contexts, len(places))
    Console().print(_table(found))
    return write_json(output / NAME, found)


def _open(folder: Path) -> _Run:
    row = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    model = load(folder)
    if not isinstance(model, Transformer) or model.head_name != "lm" or not model.causal or model.vocab != 256:
        raise ValueError(f"run must be of causal language models over bytes (task=text), got {folder}")
    return _Run(folder, str(row.get("backend") or folder.name), row, model)


def _named(runs: list[_Run]) -> list[_Run]:
    """Runs by their backends; by their folders where a backend stands there twice."""
    names = [run.name for run in runs]
    found = [run if names.count(run.name) == 1 else _Run(run.folder, run.folder.name, run.row, run.model)
             for run in runs]  # fmt: skip
    if len({run.name for run in found}) < len(found):
        raise ValueError(f"run must be of folders of different names, got {', '.join(str(r.folder) for r in runs)}")
    return found


def _contexts(config: ContextConfig, runs: list[_Run]) -> list[int]:
    lengths = [length for run in runs if (length := run.row.get("seq_len"))]
    if config.contexts is None and not lengths:
        raise ValueError("contexts must be given where no run says what length it was trained at, got null")
    step = max(1, 2 * max(lengths, default=1) // STEPS)
    found = [step * number for number in range(1, STEPS + 1)] if config.contexts is None else list(config.contexts)
    if len(found) < 2 or sorted(set(found)) != found:
        raise ValueError(f"contexts must be two numbers of tokens or more, in rising order, got {shown(found)}")
    for run in runs:
        limit = getattr(getattr(run.model, "positions", None), "max_length", None)
        if limit is not None and found[-1] > limit:
            raise ValueError(f"contexts must be at most the {limit} positions of {run.folder}, got {found[-1]}")
    return found


def _text(config: ContextConfig, runs: list[_Run]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes, and where each document ends."""
    if config.text is not None:
        raw = np.frombuffer(Path(config.text).expanduser().read_bytes(), np.uint8)
        return raw, np.array([len(raw)])
    first = runs[0]
    for run in runs:
        if not run.row.get("data") or run.row["data"].get("digest") != (first.row.get("data") or {}).get("digest"):
            raise ValueError(f"run must be of trainings over one text, or text=FILE be given, got {run.folder}")
    task: Any = build(first.row["config"]["task"], "task")
    known = task.describe(first.row["seq_len"]).get("digest")
    if known != first.row["data"]["digest"]:
        raise ValueError(f"the text of {first.folder} must be what it was trained on, got one that has changed since; "
                         "text=FILE takes another")  # fmt: skip
    corpora = getattr(task, "corpora", {})
    if "test" not in corpora:
        raise ValueError(f"run must be of trainings with a test set of text, got {first.folder}; text=FILE takes any")
    return corpora["test"].data, corpora["test"].ends


def _found(
    config: ContextConfig, runs: list[_Run], losses: Mapping[str, Any], contexts: list[int], positions: int
) -> dict[str, Any]:
    """What the file holds; its losses are rounded, and the lengths are those of the file's losses."""
    rounded = {
        name: {each: [round(loss, DIGITS) for loss in line] for each, line in mine.items()}
        for name, mine in losses.items()
    }
    reached = {share: relative_context(rounded, share=share, threshold=config.threshold) for share in SHARES}
    return {
        "kind": "context", "contexts": contexts, "positions": positions, "threshold": config.threshold,
        "runs": [
            {
                "name": run.name, "backend": run.row.get("backend"), "id": run.row.get("id"),
                "bits_per_byte": [float(np.mean(rounded[run.name][each]) / np.log(2)) for each in contexts],
                "reach": [
                    {"share": share, **many[run.name]._asdict()} for share, many in reached.items()
                ],
                "losses": [rounded[run.name][each] for each in contexts],
            }
            for run in runs
        ],
    }  # fmt: skip


def _table(found: Mapping[str, Any]) -> Table:
    title = f"relative effective context of {len(found['runs'])} models, threshold {found['threshold']:g}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("model", no_wrap=True)
    for share in SHARES:
        shown.add_column(f"hardest {share:.0%}", justify="right")
    for length in (found["contexts"][0], found["contexts"][-1]):
        shown.add_column(f"bits per byte after {length:,}", justify="right")
    for run in found["runs"]:
        lengths = [f"{'' if each['falls'] else '≥ '}{each['tokens']:,}" for each in run["reach"]]
        shown.add_row(run["name"], *lengths, *(f"{run['bits_per_byte'][place]:.3f}" for place in (0, -1)))
    return shown
