"""What must not change unnoticed: FLOPs and peak bytes of every backend at two lengths.

    python -m attention_zoo.measure.regression tests/regression.json      # record anew, after a change that means to

FLOPs are exact. Bytes may move by `TOLERANCE`, and are compared only under the torch that they were recorded with,
since torch's own kernels take work space; one thread on both sides. Seconds are no part of it: they tell the machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from attention_zoo import registry
from attention_zoo.files import write_json
from attention_zoo.measure.cell import SpeedCell, analytic_flops
from attention_zoo.measure.flops import LinearFlops
from attention_zoo.measure.memory import peak_memory
from attention_zoo.measure.work import prepare

TOLERANCE = 0.03
COMMAND = "python -m attention_zoo.measure.regression tests/regression.json"


def grid(backends: Iterable[str] | None = None) -> dict[str, SpeedCell]:
    """Forward and backward at 1k and 4k of layers, and of cores where there are any; default all shipped backends."""
    names = [name for name in registry.available() if shipped(name)] if backends is None else backends
    cells = {
        f"{name} {variant} {length}": SpeedCell(
            name, length, heads=2, head_width=64, variant=variant, threads=1, device="cpu"
        )
        for name in names
        for variant in ("core", "layer")
        for length in (1024, 4096)
    }
    return {name: cell for name, cell in cells.items() if cell.variant == "layer" or cell.build().core(1, 1)}


def shipped(backend: str) -> bool:
    return registry.recipe(backend)[0].__module__.startswith("attention_zoo.")


def observe(cell: SpeedCell) -> dict[str, int | None]:
    """FLOPs and peak bytes of a second call: what the first one leaves in caches is none of it."""
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    layer = cell.build()
    work = prepare(layer, cell.shape(), variant=cell.variant, phase=cell.phase)
    work.before()
    with LinearFlops(layer) as linear:
        work.run()
    flops, _ = analytic_flops(cell, layer, linear.flops, work.seen)
    work.before()
    return {"flops": flops, "peak_bytes": peak_memory(work.run).peak_bytes}


def torch_release() -> str:
    """Without the build: CPU kernels are the same in all."""
    return torch.__version__.partition("+")[0]


def record() -> dict[str, Any]:
    """What the file holds."""
    return {"torch": torch_release(), "cells": {name: observe(cell) for name, cell in grid().items()}}


def complaint(name: str, found: dict[str, int | None], recorded: dict[str, Any]) -> str | None:
    """What moved, in one line; None where nothing did.

    Args:
        name: of the cell.
        found: see `observe`.
        recorded: the whole file.
    """
    known = recorded["cells"].get(name)
    if known is None:
        return f"{name} is not recorded; {COMMAND}"
    if found["flops"] != known["flops"]:
        return f"{name}: {found['flops']} FLOPs, recorded {known['flops']}; if that is meant: {COMMAND}"
    change = (found["peak_bytes"] or 0) / known["peak_bytes"] - 1
    if recorded["torch"] == torch_release() and abs(change) > TOLERANCE:
        return f"{name}: {change:+.1%} peak bytes ({found['peak_bytes']}); if that is meant: {COMMAND}"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {COMMAND}")
    path = Path(sys.argv[1])
    before = json.loads(path.read_text()) if path.is_file() else {"torch": torch_release(), "cells": {}}
    now = record()
    for name, found in now["cells"].items():
        said = complaint(name, found, before)
        print(said.partition(";")[0] if said else f"{name}: as recorded")
    write_json(path, now)
