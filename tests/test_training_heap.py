"""What a training has freed stays with its process, and is not asked of the system again."""

import subprocess
import sys
from pathlib import Path

import pytest

from attention_zoo.training import run, timing
from attention_zoo.training.config import compose_training
from attention_zoo.training.heap import keep_freed

CODE = """
import resource, torch
from attention_zoo.training.heap import keep_freed
{told}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (2**18, 2**22, 2**24):  # 1, 16 and 64 MiB
            torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(told: str) -> int:
    said = subprocess.run([sys.executable, "-c", CODE.format(told=told)], capture_output=True, text=True, check=True)
    return int(said.stdout)


def test_pages_are_asked_for_once() -> None:
    if not keep_freed():
        pytest.skip("the C library takes no such word")
    kept, anew = faults("assert keep_freed()"), faults("")
    assert 5 * kept < anew  # pages of 4 KiB: 64 MiB are 16,384; with large pages there are fewer of both


def test_a_training_on_a_cpu_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for module in (run, timing):
        monkeypatch.setattr(module, "keep_freed", lambda name=module.__name__: asked.append(name))
    words = ["task=mqar", "steps=1", "seq_len=16", "batch=2", "task.pairs=2", "task.test_examples=2", "model.dim=16"]
    config = compose_training([*words, "device=cpu", "threads=1", "tracker=none", "trainer.progress=none"])
    assert run.run_training(config, tmp_path)["status"] == "ok"
    assert "error" not in timing.timed_steps(config, 1)
    assert asked == [run.__name__, timing.__name__]
