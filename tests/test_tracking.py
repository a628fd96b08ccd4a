"""Trackers: JSONL has everything, W&B never hangs, never fails a run and never loses one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attention_zoo.files import read_jsonl
from attention_zoo.tracking import JsonlTracker, NoTracker, RunInfo, Trackers, WandbTracker
from attention_zoo.tracking.tracker import figures

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


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_tracking import ROW, info
from attention_zoo.tracking import WandbTracker
notices, began = [], time.monotonic()
tracker = WandbTracker(info(Path(sys.argv[2]), notices), init_timeout=float(sys.argv[3]), finish_timeout=1.0)
print("settings", tracker.run.settings.finish_timeout, tracker.run.group, tracker.run.job_type, tracker.run.offline)
for step in range(5):
    tracker.log({"train/loss": 1.0 / (step + 1)}, step)
tracker.result(ROW)
tracker.finish(failed=False)
print("notices", len(notices), *notices)
print("seconds", time.monotonic() - began, flush=True)
"""


def follow(folder: Path, init_timeout: float = 20.0, **environment: str) -> tuple[str, float]:
    """A tracked run in a process of its own: its output and its seconds from start to finish."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(folder), str(init_timeout)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, float(done.stdout.split("seconds ")[1])


def recorded(folder: Path) -> bytes:
    """All that lies on the disk of offline runs."""
    return b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))


def test_without_a_key_it_is_offline_and_complete(tmp_path: Path) -> None:
    output, _ = follow(tmp_path)
    assert "settings 1.0 text-512 full True" in output
    assert "notices 0" in output
    kept = recorded(tmp_path)
    for name in (b"train/loss", b"speed/step_seconds", b"seq_len", b"final/bits_per_byte", b"speed/*", b"text-512"):
        assert name in kept, name


def test_with_a_key_but_no_network_it_goes_on_offline_within_seconds(tmp_path: Path) -> None:
    output, seconds = follow(tmp_path, WANDB_API_KEY="0" * 40)
    assert seconds < 30  # W&B alone takes about two minutes
    assert (
        "notices 1 W&B: http://127.0.0.1:9 cannot be reached (Connection refused); this run goes on offline" in output
    )
    assert b"train/loss" in recorded(tmp_path)


@pytest.mark.slow
def test_a_server_that_never_answers_cannot_hold_a_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        output, seconds = follow(tmp_path, 1.0, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address)
    assert seconds < 60
    assert "notices 1 W&B: " in output
    assert "this run goes on offline" in output
    assert b"train/loss" in recorded(tmp_path)


class Broken:
    """W&B at its worst: everything raises."""

    class Settings:
        def __init__(self, **given: Any):
            self.base_url, self.api_key = "http://127.0.0.1:9", None

    @staticmethod
    def setup(settings: Any = None) -> Any:
        return type("Setup", (), {"settings": Broken.Settings()})

    @staticmethod
    def init(**given: Any) -> Any:
        raise RuntimeError("no\nway")


def test_when_nothing_works_the_run_goes_on_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Broken)  # type: ignore[arg-type]
    notices: list[str] = []
    tracker = WandbTracker(info(tmp_path, notices))
    tracker.log({"train/loss": 1.0}, 1)
    tracker.result(ROW)
    tracker.finish(failed=False)
    assert notices == ["W&B does not start: no way; metrics.jsonl has every figure"]


def test_a_run_that_breaks_midway_is_left_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def define_metric(self, *given: Any, **named: Any) -> None: ...

        def log(self, values: Any) -> None:
            raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "wandb", Broken)  # type: ignore[arg-type]
    monkeypatch.setattr(Broken, "init", staticmethod(lambda **given: Run()))
    notices: list[str] = []
    tracker = WandbTracker(info(tmp_path, notices))
    tracker.log({"train/loss": 1.0}, 1)
    tracker.log({"train/loss": 1.0}, 2)
    tracker.result(ROW)
    tracker.finish(failed=False)
    assert notices == ["W&B takes no more figures: disk full; metrics.jsonl has every figure"]


@pytest.mark.parametrize("place", ["environment", "netrc"])
def test_a_key_is_found_where_wandb_would_find_it(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {'0' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
    modes: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", Broken)  # type: ignore[arg-type]
    monkeypatch.setattr(Broken, "init", staticmethod(lambda **given: modes.append(given["mode"])))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(
            Broken.Settings, "__init__", lambda self, **g: vars(self).update(base_url=address, api_key=None)
        )
        WandbTracker(info(tmp_path))
        WandbTracker(info(tmp_path), mode="offline")
        monkeypatch.setenv("WANDB_MODE", "offline")
        WandbTracker(info(tmp_path))
    assert modes[0] == "online"
    assert modes[-1] == modes[-2] == "offline"


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tracker.mode must be one of auto, online, offline, got 'on'"):
        WandbTracker(info(tmp_path), mode="on")


def test_wandb_is_imported_only_where_it_is_wanted() -> None:
    code = "import sys, attention_zoo.training.run; assert 'wandb' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
