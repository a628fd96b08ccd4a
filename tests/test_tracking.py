"""Trackers: JSONL has everything, W&B never hangs, never fails a run and never loses one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults.wandb_server import INIT_SECONDS, Server, follow, running

from attention_zoo.files import read_jsonl
from attention_zoo.tracking import Guarded, JsonlTracker, NoTracker, RunInfo, Trackers, WandbTracker
from attention_zoo.tracking.tracker import figures
from attention_zoo.tracking.wandb_process import key_for
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

KEY = "0" * 40

ROW = {
    "kind": "quality", "status": "ok", "seq_len": 128, "step_seconds": 0.1, "tokens_per_second": 5.0,
    "peak_bytes": None, "metrics": {"bits_per_byte": 2.0},
}  # fmt: skip


def info(folder: Path, notices: list[str] | None = None) -> RunInfo:
    say = (notices if notices is not None else []).append
    return RunInfo(folder, "text-full-s0", "0123456789abcdef", "full", "text-512", {"lr": 0.1}, say)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, mode or proxy of the machine; every attempt goes nowhere."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_jsonl_is_complete_at_every_moment(tmp_path: Path) -> None:
    tracker = JsonlTracker(info(tmp_path))
    for step in range(3):
        tracker.log({"train/loss": 1.5 - step, "train/odd": float("nan")}, step)
        rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
        assert rows[-1] == {"step": step, "train/loss": 1.5 - step, "train/odd": None}
        assert len(rows) == step + 1
    tracker.finish(failed=True)


def test_several_trackers_all_hear() -> None:
    heard: list[Any] = []

    class Ear(NoTracker):
        def log(self, metrics: Any, step: int) -> None:
            heard.append((metrics, step))

        def result(self, row: Any) -> None:
            heard.append(row["status"])

        def finish(self, *, failed: bool) -> None:
            heard.append(failed)

    both = Trackers([Ear(info(Path())), Ear(info(Path()))])
    both.log({"a/b": 1.0}, 3)
    both.result(ROW)
    both.finish(failed=False)
    assert heard == [({"a/b": 1.0}, 3)] * 2 + ["ok"] * 2 + [False] * 2


def test_speed_and_memory_are_drawn_over_the_length() -> None:
    assert figures(ROW) == {"seq_len": 128, "speed/step_seconds": 0.1, "speed/train_tokens_per_second": 5.0}
    cell = {"kind": "speed", "phase": "forward", "length": 4096, "seconds": 0.5, "peak_bytes": 7, "status": "ok"}
    assert figures(cell) == {"seq_len": 4096, "speed/forward_seconds": 0.5, "memory/forward_peak_bytes": 7}


def recorded(folder: Path) -> bytes:
    """All that lies on the disk of offline runs."""
    return b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))


def test_without_a_key_it_is_offline_and_complete(tmp_path: Path) -> None:
    found = follow(tmp_path, {})
    assert (found["notices"], found["left"], found["stderr"]) == ([], [], "")
    kept = recorded(tmp_path)
    for name in (b"train/loss", b"speed/step_seconds", b"seq_len", b"final/loss", b"speed/*", b"text-64"):
        assert name in kept, name


def test_online_every_figure_reaches_the_server(tmp_path: Path) -> None:
    with Server() as server:
        found = follow(tmp_path, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
    assert found["notices"] == []
    assert found["logged"] < 1.0, "the run does not wait for W&B to start"
    said = "".join(server.stream)
    for step in range(5):
        assert f'\\"step\\":{step}' in said.replace(" ", "")
    assert "final/loss" in said


def test_a_failed_run_reaches_the_server_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_training(["task=mqar", "model.heads=3", "trainer.progress=none"])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        row = run_training(config, tmp_path / "run")
    assert row["error"] == "model.heads must divide model.dim, got heads=3 for dim=64"
    assert row["notices"] == []
    said = "".join(server.stream)
    assert row["error"] in said
    assert '\\"failed\\"' in said
    assert '"exitcode":1' in said.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "begins", "hurt", "finish_s", "word"),
    [
        ("drips", "start", None, 60.0, "no answer in time; this run goes on offline"),
        ("silent", "stream", None, 4.0, "W&B does not finish: Timed out"),
        (None, "start", "stop core", 3.0, "W&B did not finish within 3 s and was ended"),
    ],
)
def test_nothing_of_wandb_holds_a_run(
    fault: str | None, begins: str, hurt: str | None, finish_s: float, word: str, tmp_path: Path
) -> None:
    environment = {"WANDB_API_KEY": KEY}
    with Server(fault, begins) as server:
        environment["WANDB_BASE_URL"] = server.url
        found = follow(
            tmp_path, environment, hurt=hurt, started=begins == "stream" or hurt is not None, finish_s=finish_s
        )
    assert len(found["notices"]) == 1
    assert word in found["notices"][0]
    assert found["left"] == []
    assert found["finished"] < min(finish_s, INIT_SECONDS + 15) + 2


def test_one_limit_holds_for_a_start_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(BROKEN.format(init="import time; time.sleep(100)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    notices: list[str] = []
    tracker = WandbTracker(info(tmp_path, notices), init_timeout=90, finish_timeout=1.5)
    began = time.monotonic()
    tracker.finish(failed=False)
    assert time.monotonic() - began < 20, "neither init_timeout nor the time for an import comes on top"
    cure = f"attention-zoo sync runs={tmp_path} sends it, metrics.jsonl has every figure"
    assert notices == [f"W&B did not start and finish within 1.5 s and was ended; {cure}"]


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        (
            {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"},
            "W&B: http://127.0.0.1:9 cannot be reached (Connection refused); this run goes on offline",
        ),
        ({"WANDB_MODE": "banana", "WANDB_BASE_URL": "nonsense"}, "this run goes on offline"),
    ],
)
def test_what_cannot_be_online_goes_on_offline_with_one_line(
    environment: dict[str, str], word: str, tmp_path: Path
) -> None:
    found = follow(tmp_path, environment)
    assert len(found["notices"]) == 1
    assert word in found["notices"][0]
    assert found["stderr"] == ""
    assert b"train/loss" in recorded(tmp_path)


BROKEN = """
class Settings:
    base_url, api_key = "http://127.0.0.1:9", None
    def __init__(self, **given): pass
def setup(settings=None): return Settings
Settings.settings = Settings
def teardown(): pass
def init(mode, **given):
    {init}
class Run:
    offline, starting_step = True, 0
    class summary:
        update = staticmethod(lambda values: None)
    def define_metric(self, *given, **named): pass
    def log(self, values): raise OSError("disk\\nfull")
    def finish(self, exit_code): pass
"""


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("raise RuntimeError('no\\nway')", ["W&B: no way; this run goes on offline", "W&B does not start: no way;"]),
        ("raise SystemExit(3)", ["W&B: 3; this run goes on offline", "W&B does not start: 3;"]),
        ("import os; os._exit(3)", ["W&B: has ended; this run goes on offline", "W&B does not start: has ended;"]),
        ("return Run()", ["W&B takes no more figures: disk full; "]),
    ],
)
def test_whatever_wandb_does_is_one_line(
    init: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(BROKEN.format(init=init))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    notices: list[str] = []
    tracker = WandbTracker(info(tmp_path, notices))
    tracker.log({"train/loss": 1.0}, 1)
    tracker.log({"train/loss": 1.0}, 2)
    tracker.result(ROW)
    tracker.finish(failed=False)
    assert len(notices) == len(words)
    for notice, word in zip(notices, words):
        assert notice.startswith(word)
        assert notice.endswith(("metrics.jsonl has every figure", "wandb/offline-run-*)"))


def test_wandb_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom attention_zoo.tracking import RunInfo, WandbTracker\n"
        "t = WandbTracker(RunInfo(Path(sys.argv[1]), 'a', 'b', 'c', 'd', {}, print))\n"
        "while not t._started: time.sleep(0.01)\n"
        "print('started', flush=True); time.sleep(100)"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    assert run.stdout is not None
    assert run.stdout.readline() == b"started\n"
    assert len(running(tmp_path)) >= 3, "the run, W&B beside it, and W&B's own process"
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 20
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(tmp_path) == []


def test_a_tracker_that_fails_is_left_alone_with_one_line() -> None:
    class Bad(NoTracker):
        def log(self, metrics: Any, step: int) -> None:
            raise RuntimeError("no\nroom")

    notices: list[str] = []
    tracker = Guarded(Bad(info(Path())), notices.append)
    tracker.log({}, 1)
    tracker.log({}, 2)
    tracker.finish(failed=False)
    assert notices == ["Bad failed and is left alone: RuntimeError: no room; metrics.jsonl has every figure"]


class Settings:
    """What `wandb.setup()` gives."""

    def __init__(self, api_key: str | None = None):
        self.settings = self
        self.api_key = api_key

    def setup(self) -> Settings:
        return self


def test_a_key_is_found_where_wandb_would_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = "http://127.0.0.1:9"
    assert not key_for(Settings(), host)
    assert key_for(Settings("key"), host)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert key_for(Settings(), host)
    assert not key_for(Settings(), "http://elsewhere")
    (tmp_path / "netrc").write_bytes(b"\xff\xfe nonsense")
    assert not key_for(Settings(), host)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert key_for(Settings(), host)


def test_options_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tracker.mode must be one of auto, online, offline, got 'on'"):
        WandbTracker(info(tmp_path), mode="on")
    for wrong in (0, -1.0, float("nan"), float("inf"), "soon", True):
        with pytest.raises(ValueError, match=r"tracker.finish_timeout must be a positive number of seconds, got"):
            WandbTracker(info(tmp_path), finish_timeout=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("lines", [None, 5])
def test_damaged_lines_are_left_out_and_told(lines: int | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": 2}\n{"step": 2, "evaluate/x": 3}\n{"step": 3}\n{"st'
    )
    told: list[str] = []
    JsonlTracker.rewind(tmp_path, 2, lines, on_bad=told.append)
    kept = list(read_jsonl(path))
    assert kept == [{"step": 1}, {"step": 2}, *([{"step": 2, "evaluate/x": 3}] if lines is None else [])]
    assert len(told) == 3
    assert all("metrics.jsonl" in line and line.endswith("left out") and "\n" not in line for line in told)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be read: Is a directory"):
        JsonlTracker.rewind(tmp_path, 2)
