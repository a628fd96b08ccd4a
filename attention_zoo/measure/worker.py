"""The fresh process of one cell: a request in JSON comes in, a row in JSON goes out.

    echo '{"cell": {"backend": "full", "length": 256}}' | python -m attention_zoo.measure.worker

Request: cell (fields of `SpeedCell`), repeats, budget_s, memory_limit_bytes. What a mechanism prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import torch

from attention_zoo.measure.cell import SpeedCell, run_cell
from attention_zoo.measure.memory import data_bytes
from attention_zoo.measure.speed import matmul_rate


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that a stray print, even from C, cannot spoil the answer
    request = json.load(sys.stdin)
    cell = SpeedCell(**request.pop("cell"))
    limit = request.pop("memory_limit_bytes", None)
    if limit is not None:
        limit_memory(cell, limit)
    with answer:
        json.dump(run_cell(cell, **request), answer, allow_nan=False)


def limit_memory(cell: SpeedCell, limit_bytes: int) -> None:
    """Let this process have so much memory on top of what it holds now, so that an excess fails here, not elsewhere.

    On a CPU the data segment is limited: torch maps far more address space than it uses, so a limit on that would
    stop it long before. Only Linux enforces this.
    """
    if torch.device(cell.device).type == "cuda":
        total = torch.cuda.get_device_properties(cell.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), cell.device)
        return
    torch.set_num_threads(cell.threads)
    matmul_rate(size=256)  # threads start now: with no memory left for their stacks they would end the process
    now = data_bytes()
    if now is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_at_most(now + limit_bytes, hard), hard))


def _at_most(wanted: int, hard: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def request_of(cell: dict[str, Any], **how: Any) -> str:
    """The JSON that a worker reads."""
    return json.dumps({"cell": cell, **how}, allow_nan=False)


if __name__ == "__main__":
    main()
