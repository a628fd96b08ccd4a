"""Several processes that talk to each other by gloo: forked from one that has imported everything, once for all cases.

`python -m tests.processes MODULE:FUNCTION SIZE GIVEN FOUND`: the function gets what the JSON file GIVEN holds, in each
of SIZE processes; what it returns in process 0 is written to FOUND.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = timedelta(seconds=60)
"""How long one waits for another: a case that hangs fails."""
ROOT = Path(__file__).parents[1]


def together(size: int, work: str, given: Any) -> Any:
    """What `work`, "module:function", returns for `given` in process 0 of so many; both are plain values."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("given.json", "found.json")]
        files[0].write_text(json.dumps(given))
        command = [sys.executable, "-m", "tests.processes", work, str(size), *map(str, files)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(files[1].read_text())


def main(work: str, size: int, given: Path, found: Path) -> int:
    import torch

    torch.set_num_threads(1)
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os._exit(_one(function, rank, size, given, found))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _one(function: Any, rank: int, size: int, given: Path, found: Path) -> int:
    import torch.distributed as dist

    try:
        store = f"file://{found.parent}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=PATIENCE)
        said = function(json.loads(given.read_text()))
        if rank == 0:
            found.write_text(json.dumps(said))
        dist.destroy_process_group()
    except BaseException:
        print(f"process {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))
