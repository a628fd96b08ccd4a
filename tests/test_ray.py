"""Who asks a worker of Ray to stop: its run is saved, and the sweep goes on with it by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
ROOT = Path(__file__).parents[1]
WORDS = (
    "task=mqar", "device=cpu", "threads=1", "steps=400", "batch=4", "seq_len=16", "model.dim=16", "tracker=none",
    "task.test_examples=8", "task.pairs=2", "trainer.progress=none", "trainer.checkpoint_every=100000",
    "trainer.log_every=5", "trainer.eval_every=200", "seed=0,1", "hydra/launcher=ray",
    "+hydra.launcher.ray.init.include_dashboard=false", "+hydra.launcher.ray.init.num_cpus=1", "-m",
)  # fmt: skip
PATIENCE_S = 900.0
"""Ray alone takes minutes on a machine at work."""


def beneath(parent: int) -> dict[int, str]:
    """How each process beneath one calls itself."""
    parents, found = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
            found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it is gone
            continue
    mine = {parent}
    while more := {pid for pid, above in parents.items() if above in mine} - mine:
        mine |= more
    return {pid: said for pid, said in found.items() if pid in mine}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_worker_that_is_asked_to_stop_saves_and_the_sweep_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "attention_zoo", "train", *WORDS, f"output={tmp_path / 'runs'}"], cwd=ROOT,
            stdout=said, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
            assert sweep.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        (worker,) = (pid for pid, name in beneath(sweep.pid).items() if name.startswith("ray::_run_job"))
        os.kill(worker, number)
        assert sweep.wait(PATIENCE_S) == 0, (tmp_path / "said").read_text()
    finally:
        sweep.kill()
        sweep.wait()
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/result.json"))]
    assert [(row["status"], row["steps"]) for row in rows] == [("ok", 400)] * 2
    (resumed,) = (row["resumed_at"] for row in rows if row["resumed_at"])
    assert 0 < resumed < 400, "saved where it was: there is no checkpoint on the way"
