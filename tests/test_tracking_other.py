"""A W&B server of another make, a killed training, a server that dies in the middle: nothing hangs, nothing is lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults.other_wandb_server import LASTING, MANNERS, Other
from faults.wandb_server import follow, running
from rich.console import Console

from attention_zoo.commands.main import main
from attention_zoo.jobs.benchmark import benchmark
from attention_zoo.jobs.following import send_end
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.tracking.receipts import receipts
from attention_zoo.training.config import compose_training

KEY = {"WANDB_API_KEY": "0" * 40}
ID = "0123456789abcdef"
WORDS = (
    "task=text", "attention=longformer", "attention.window=8", "batch=2", "seq_len=32", "threads=1", "model.dim=16",
    "task.max_bytes=100000", "task.held_out_bytes=20000", "task.evaluation_rows=2", "trainer.progress=none",
    "trainer.log_every=1", "tracker=wandb",
)  # fmt: skip
TRAIN = (
    "import sys\nfrom attention_zoo.training.config import compose_training\n"
    "from attention_zoo.training.run import run_training\n"
    "print(run_training(compose_training(sys.argv[2:]), sys.argv[1])['status'])"
)


def environment(folder: Path, url: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "NO_PROXY": "127.0.0.1"}
    return {**clean, **home, **KEY, "WANDB_BASE_URL": url}


def train(folder: Path, url: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder / "run"), *WORDS, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder, url),
    )  # fmt: skip


def sync(folder: Path, url: str) -> None:
    runs = [str(path) for path in folder.glob("wandb/*run-*")]
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--include-online", *runs],
        env=environment(folder, url), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def until(what: Any, seconds: float = 150.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


def losses(server: Other, run: str) -> list[int]:
    return [line["step"] for _, line in sorted(server.lines.get(run, {}).items()) if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "manner",
    [pytest.param(each, marks=pytest.mark.long if each in ("old", "slow", "torn") else ()) for each in MANNERS],
)
def test_a_server_of_another_make_holds_nothing_up(manner: str, tmp_path: Path) -> None:
    finish_s = 60.0 if manner in LASTING else 20.0
    with Other(manner) as server:
        found = follow(tmp_path, {**KEY, "WANDB_BASE_URL": server.url}, started=manner == "dies", finish_s=finish_s)
    assert found["code"] == 0, found["stderr"]
    assert found["finished"] < finish_s + 2
    assert found["logged"] < 1.0
    assert (found["left"], found["stderr"]) == ([], "")
    if not found["notices"]:
        assert manner != "dies"
        assert losses(server, ID) == [0, 1, 2, 3, 4]
        assert server.summary[ID]["final/loss"] == 2.0
        assert server.ended[ID] == 0
        return
    assert len(found["notices"]) == 1, "one line says what did not arrive"
    with Other("chunked") as later:
        sync(tmp_path, later.url)
    assert losses(later, ID) == [0, 1, 2, 3, 4], "all of it was on the disk"
    assert later.summary[ID]["final/loss"] == 2.0


@pytest.mark.slow
def test_a_killed_training_is_lost_there_and_the_same_run_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Other("old") as server:
        first = train(tmp_path, server.url, "steps=100000", "trainer.checkpoint_every=1")
        try:
            (name,) = until(lambda: [run for run in server.lines if len(losses(server, run)) > 3])
        finally:
            first.kill()
            first.communicate()
        until(lambda: name in server.ended)
        assert (server.ended[name], server.summary[name]["status"]) == (1, "lost")
        assert "ended from outside" in server.summary[name]["error"]
        until(lambda: running(tmp_path) == [], 20)
        before = max(losses(server, name))
        checkpoint = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert before <= checkpoint + 1
        second = train(tmp_path, server.url, "steps=100000", "trainer.checkpoint_every=1")
        try:
            until(lambda: max(losses(server, name)) > before + 3)
            assert set(server.lines) == {name}, "the same run"
            second.send_signal(signal.SIGTERM)
            second.communicate(timeout=60)
            ((_, found),) = receipts(tmp_path)
            assert found.parts == 2
        finally:
            second.kill()
            second.communicate()
        for key, value in environment(tmp_path, server.url).items():
            monkeypatch.setenv(key, value)
        assert main(["sync", f"runs={tmp_path}"]) == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "train/loss" in line} <= set(losses(server, name))


@pytest.mark.slow
def test_a_server_that_dies_in_a_training_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Other("dies", lives=2) as server:
        run = train(tmp_path, server.url, "steps=60", "tracker.finish_timeout=6")
        said, wrong = run.communicate(timeout=120)
    assert said.strip() == "ok", wrong
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(row["notices"]) == 1
    assert f"attention-zoo sync runs={tmp_path / 'run'}" in row["notices"][0]
    for name, value in environment(tmp_path, "").items():
        monkeypatch.setenv(name, value)
    with Other("slow") as later:
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        assert main(["sync", f"runs={tmp_path}"]) == 0
    assert losses(later, row["id"]) == list(range(1, 61))
    assert later.summary[row["id"]]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("manner", [pytest.param("old", marks=pytest.mark.long), "busy", "dies"])
def test_cells_reach_it_or_stay(manner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path, "").items():
        monkeypatch.setenv(name, value)
    tracker = compose_training(["tracker=wandb", "tracker.mode=online", "tracker.init_timeout=5"])["tracker"]
    sizes = {"lengths": [16, 24], "heads": 1, "head_width": 8, "threads": 1, "device": "cpu", "repeats": 1}
    given = {**sizes, "backends": ["longformer"], "baselines": False, "options": {"longformer": {"window": 4}}}
    config = BenchmarkConfig(**given, budget_s=0.1, tracker=tracker, output=str(tmp_path / "costs"))
    with Other(manner) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        began = time.monotonic()
        rows = benchmark(config, Console(file=io.StringIO()))
        assert time.monotonic() - began < 3 * (60 + 2) + 60, "each run has its time-out, and no more"
    assert [row["status"] for row in rows] == ["ok", "ok"]
    if manner != "old":  # what did not arrive has stayed
        with Other("chunked") as later:
            sync(tmp_path / "costs", later.url)
        for run, lines in server.lines.items():
            later.lines.setdefault(run, {}).update(lines)
        server = later
    for row in rows:
        (line,) = server.lines[row["id"]].values()
        assert line["speed/forward_backward_seconds"] == row["seconds"]


def test_whoever_started_a_run_tells_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path, "").items():
        monkeypatch.setenv(name, value)
    config = compose_training([*WORDS, "tracker.mode=online"])
    row: Any = {
        "kind": "quality", "id": ID, "backend": "longformer", "status": "oom", "error": "the kernel ended it",
        "config": config, "task": "text", "seed": 0, "seq_len": 32,
    }  # fmt: skip
    said: list[str] = []
    with Other("chunked") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        send_end(row, tmp_path, say=said.append)
    assert said == []
    assert (server.summary[ID]["status"], server.summary[ID]["error"]) == ("oom", "the kernel ended it")
    assert server.ended[ID] == 1
    send_end({**row, "config": {**config, "tracker": None}}, tmp_path, say=said.append)
    assert said == [], "nobody follows it"
