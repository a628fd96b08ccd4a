"""Two writers of one folder, NaN and infinity in weights, corrupt data to train on, a hub that cannot be reached.

Each must end in one line that says what is wrong, and leave what others wrote as it is; data that can be read train.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import attention_zoo as zoo
from attention_zoo.integrations import weights
from attention_zoo.locks import owning
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

from . import Counts
from .disk import TINY

TITLE = "two writers, NaN in weights, corrupt data, no network"
SMALL, LARGE = 24, 800
TEXT = (
    "tracker=none", "device=cpu", "trainer.progress=none", "task=text", "task.held_out=null", "task.evaluation_rows=2",
    "task.span=1", "model.dim=8", "model.heads=2", "model.depth=1", "seq_len=8", "batch=2", "steps=2", "threads=1",
    "trainer.eval_every=2",
)  # fmt: skip
Problems = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Throw `count` of them."""
    found = Counts()
    for number in range(count):
        case = f"odd {seed}:{number}"
        throw = (_two_writers, _bad_weights, _corrupt_data, _no_network)[number % 4]
        with tempfile.TemporaryDirectory() as made, torch.random.fork_rng(devices=[]):
            found.tries += 1
            try:
                for way, problem in throw(random.Random(case), Path(made)):
                    found.failed(way, f"{case}: {throw.__name__}: {problem}")
            except Exception as error:  # whatever escapes is what this looks for
                found.failed("raw", f"{case}: {throw.__name__}: {type(error).__name__}: {error}"[:500])
    return found


def _clear(text: Any, must: str) -> Problems:
    if not isinstance(text, str) or "\n" in text or must not in text:
        yield "raw", f"{must!r} is not said in one line: {text!r}"


def _two_writers(rng: random.Random, folder: Path) -> Problems:
    config = compose_training(TINY)
    first = run_training(config, folder) if rng.random() < 0.5 else None
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    with owning(folder):
        second = run_training({**config, "force": rng.random() < 0.5}, folder)
    yield from _clear(second["error"], f"process {os.getpid()} on ")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    if after != before:
        yield "lost", f"the second writer changed {sorted(set(after) ^ set(before)) or 'files of the first'}"
    row = run_training(config, folder)
    if row["status"] != "ok" or (first is not None and row["metrics"] != first["metrics"]):
        yield "lost", f"afterwards: {row['status']}, {row['error']}"


def _bad_weights(rng: random.Random, folder: Path) -> Problems:
    model = zoo.Transformer(attention=rng.choice(zoo.available()), vocab=256, dim=8, heads=2, depth=1, positions="none")
    weight = rng.choice([each for each in model.parameters() if each.numel()])
    with torch.no_grad():
        weight.view(-1)[rng.randrange(weight.numel())] = rng.choice((math.nan, math.inf, -math.inf))
    path = zoo.save(model, folder / "model.safetensors")
    try:
        zoo.load(path)
        yield "wrong", "a model that holds NaN or infinity was loaded"
    except ValueError as error:
        yield from _clear(str(error), "NaN or infinity")


def _corrupt_data(rng: random.Random, folder: Path) -> Problems:
    place = folder / "text"
    kind = rng.choice(("nothing", "empty", "bytes", "link", "short", "folder", "nul", "missing"))
    if kind != "missing":
        place.mkdir()
    if kind in ("empty", "bytes", "short", "nul"):
        size = {"empty": 0, "short": rng.randrange(1, 8)}.get(kind, 4000)
        for index in range(4):
            (place / f"{index}.txt").write_bytes(b"\0" * size if kind == "nul" else rng.randbytes(size))
    if kind == "link":
        (place / "gone.txt").symlink_to(folder / "nowhere")
    if kind == "folder":
        (place / "a.txt").mkdir()
    row = run_training(compose_training([*TEXT, f"task.path={place}"]), folder / "run")
    if row["status"] == "ok":
        if kind != "bytes" or not all(math.isfinite(value) for value in row["metrics"].values()):
            yield "wrong", f"{kind}: trained to {row['metrics']}"
        return
    if kind == "bytes":
        yield "lost", f"{kind}: {row['error']}"
    # files that are all the same leave nothing to evaluate on that was not trained on
    yield from _clear(row["error"], "task.duplicates" if kind == "nul" else str(place))


def _no_network(rng: random.Random, folder: Path) -> Problems:
    name = f"nobody/{rng.getrandbits(32):x}"
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        try:
            weights.convert(name)
            yield "wrong", f"{name} was converted"
        except (ValueError, OSError) as error:
            yield from _clear(" ".join(str(error).split()), name)
