"""Several processes that talk to each other by gloo, started once, all of a test's cases run inside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=60)
"""How long one waits for another: a case that hangs fails."""


def together(size: int, work: Callable[..., Any], *given: Any) -> Any:
    """What `work(*given)` returns in process 0 of so many; plain values. It must be importable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: for the first error in any of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one, (size, folder, work, given), nprocs=size)
        return json.loads((Path(folder) / "found.json").read_text())


def _one(rank: int, size: int, folder: str, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=PATIENCE)
    try:
        found = work(*given)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()
