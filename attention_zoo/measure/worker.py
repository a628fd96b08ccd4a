"""The nursery of fresh processes: imports torch once and forks a child for each cell that it reads on stdin.

A child has run nothing when its cell starts: no tensor, no thread, no CUDA context, since this process does nothing but
import. Forking spares each cell the 3 to 4 s of CPU time that the imports take.

Spoken in lines of JSON. In: {"cell": {fields of SpeedCell}, "answer": path, "complaint": path, "memory_limit_bytes",
"repeats", "budget_s"}. Out: {"ready": true} once, then for each request {"pid": ...} and, when the child has ended,
{"exit": code or minus the signal}. The child writes its row to `answer`; what a mechanism prints goes to `complaint`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # which the first backward would import

from attention_zoo.measure.cell import SpeedCell, run_cell
from attention_zoo.measure.identity import source_digest
from attention_zoo.measure.memory import data_bytes
from attention_zoo.measure.speed import matmul_rate


def serve() -> None:
    """Fork and wait, request by request, until stdin ends."""
    source_digest()  # of the code as imported here, should somebody edit it meanwhile
    _say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(request)
        _say(pid=child)
        _, status = os.waitpid(child, 0)
        _say(exit=os.waitstatus_to_exitcode(status))


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _be_child(request: dict[str, Any]) -> None:
    code = 1
    try:
        # The pipes belong to the conversation above: a stray print, even from C, must not get into it.
        silence, complaint = os.open(os.devnull, os.O_RDONLY), os.open(request.pop("complaint"), os.O_WRONLY)
        for target, source in ((0, silence), (1, complaint), (2, complaint)):
            os.dup2(source, target)
        measure(**request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # never back into the loop


def measure(cell: dict[str, Any], answer: str, memory_limit_bytes: int | None, **how: Any) -> None:
    """Measure one cell within its limit and write its row to `answer`."""
    wanted = SpeedCell(**cell)
    if memory_limit_bytes is not None:
        limit_memory(wanted, memory_limit_bytes)
    row = run_cell(wanted, **how)
    with open(answer, "w") as file:
        json.dump(row, file, allow_nan=False)


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
    matmul_rate()  # threads and work space come now: with no memory left for stacks the process would end
    now = data_bytes()
    if now is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_at_most(now + limit_bytes, hard), hard))


def _at_most(wanted: int, hard: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


if __name__ == "__main__":
    serve()
