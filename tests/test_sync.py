"""What W&B lacks is sent from our own files, whatever became of W&B: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faults.other_wandb_server import Other
from faults.wandb_server import Server, _children
from rich.console import Console

from attention_zoo.commands.main import main
from attention_zoo.jobs.benchmark import benchmark
from attention_zoo.jobs.sync import SyncConfig, sync
from attention_zoo.locks import owning
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.tracking import RunInfo, WandbTracker
from attention_zoo.tracking.receipts import Receipt, arrived, ended, receipt, receipts
from attention_zoo.tracking.wandb_process import undelivered
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

WORDS = (
    "task=text", "attention=longformer", "attention.window=8", "batch=2", "seq_len=32", "threads=1", "model.dim=16",
    "task.max_bytes=100000", "task.held_out_bytes=20000", "task.evaluation_rows=2", "trainer.progress=none", "steps=4",
    "trainer.log_every=1", "tracker=wandb", "tracker.mode=online", "tracker.artifacts=true", "output=runs/lengths",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key, and nothing else of W&B's or a proxy's of this machine."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "0" * 40}
    for name, value in home.items():
        monkeypatch.setenv(name, value)


def sent(folder: Path, **how: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    return sync(SyncConfig(runs=str(folder), **how), said.append), said


def states(folder: Path) -> list[str]:
    return [found.state for _, found in receipts(folder)]


def holds_all(server: Server, row: Any, folder: Path) -> None:
    """Whether a server has what our files have of a training, once."""
    name = row["id"]
    assert list(server.runs) == [name]
    run, lines = server.runs[name], server.history[name]
    assert run["displayName"] == f"longformer-text-32-s0-window=8-{name[:6]}"
    assert (run["groupName"], run["jobType"]) == ("lengths/text", "longformer")
    config = {key: each["value"] for key, each in json.loads(run["config"]).items()}
    assert {"backend": "longformer", "task": "text", "seq_len": 32, "seed": 0, "attention/window": 8}.items() <= (
        config.items()
    )
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in kept:
        told = {key: value for key, value in line.items() if value is not None}
        assert sum(told.items() <= each.items() for each in lines) == 1, line
    assert server.summaries[name]["status"] == "ok"
    assert server.summaries[name]["final/bits_per_byte"] == row["metrics"]["bits_per_byte"]
    assert [line["seq_len"] for line in lines if "speed/train_tokens_per_second" in line] == [32]
    tables = {name.partition("_by_")[2].partition("_")[0]: body for name, body in server.files.items()}
    assert json.loads(tables["position"])["data"] == [list(pair) for pair in row["loss_by_position"]]
    assert server.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_run_whose_w_and_b_was_ended_before_it_wrote_is_sent_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "one"
    with Server("silent") as broken:
        monkeypatch.setenv("WANDB_BASE_URL", broken.url)
        row: Any = run_training(compose_training([*WORDS, "tracker.finish_timeout=0.2"]), run)
    assert row["status"] == "ok"
    (notice,) = row["notices"]
    assert f"attention-zoo sync runs={run} sends it" in notice
    assert not list(run.glob("wandb/*run-*/*.wandb")), "W&B has nothing that it could sync"
    assert states(run) == ["begun"]
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert main(["sync", f"runs={tmp_path / 'runs'}", "dry=true"]) == 0
        assert not server.runs, "dry"
        assert main(["sync", f"runs={tmp_path / 'runs'}"]) == 0
        holds_all(server, row, run)
        assert states(run) == ["delivered"]
        streamed = len(server.stream)
        assert sent(tmp_path / "runs") == ("", ["W&B has all of 1 run"])
        assert len(server.stream) == streamed


@pytest.mark.slow
@pytest.mark.long
def test_w_and_b_killed_in_a_training_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        killed: list[int] = []
        begin = WandbTracker.log

        def log(self: WandbTracker, metrics: Any, step: int) -> None:
            begin(self, metrics, step)
            while step == 2 and not self._started:
                time.sleep(0.02)
            if step == 2:  # it is there, and has heard of little
                assert self._process is not None
                killed.extend(_children(self._process._process.pid))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(WandbTracker, "log", log)
        row: Any = run_training(compose_training([*WORDS, "tracker.finish_timeout=20"]), tmp_path / "run")
        monkeypatch.undo()
        assert row["status"] == "ok"
        assert killed
        assert len(row["notices"]) == 1
        assert "attention-zoo sync" in row["notices"][0]
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert sent(tmp_path)[0] == ""
    holds_all(server, row, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.long
def test_a_server_that_refuses_and_is_not_heard_of_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server("refuses", "stream") as broken:
        monkeypatch.setenv("WANDB_BASE_URL", broken.url)
        row: Any = run_training(compose_training(list(WORDS)), tmp_path / "run")
        assert len(row["notices"]) == 1
        assert "401" in row["notices"][0]
        assert states(tmp_path) == ["begun"]
        wrong, said = sent(tmp_path)
        assert wrong == "1 of 1 run did not arrive; the same command sends them"
        assert said[-1].endswith(": did not arrive")
        assert states(tmp_path) == ["begun"]
    before = sorted((tmp_path / "run" / "wandb").iterdir())
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert sent(tmp_path)[0].startswith("1 of 1")
    assert sorted((tmp_path / "run" / "wandb").iterdir()) == before, "a try that failed leaves nothing"
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sent(tmp_path)[0] == ""
    holds_all(server, row, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.long
def test_what_was_written_offline_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row: Any = run_training(compose_training([*WORDS, "tracker.mode=offline"]), tmp_path / "run")
    assert (row["notices"], states(tmp_path)) == ([], ["written"])
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sent(tmp_path)[0] == ""
        ((folder, found),) = receipts(tmp_path)
        assert arrived(folder, found)
        holds_all(server, row, tmp_path / "run")
    marks = [path.with_suffix(".wandb.synced").exists() for path in folder.glob("wandb/*run-*/*.wandb")]
    assert len(marks) == 2, "what W&B wrote then and now"
    assert all(marks), "`wandb sync` would send it a second time"


def test_what_wandb_sync_has_sent_is_not_sent_again(tmp_path: Path) -> None:
    run_training(compose_training([*WORDS, "tracker.mode=offline"]), tmp_path / "run")
    (file,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    file.with_suffix(".wandb.synced").touch()
    assert sent(tmp_path) == ("", ["W&B has all of 1 run"])


@pytest.mark.slow
@pytest.mark.long
def test_a_part_that_never_arrived_is_not_forgotten_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunInfo(tmp_path, "n", "0123456789abcdef", "full", "s", {}, lambda line: None)
    with Server("silent") as broken:
        monkeypatch.setenv("WANDB_BASE_URL", broken.url)
        WandbTracker(run, mode="online", finish_timeout=0.1).finish(failed=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 2.0}\n{"step": 1, "train/loss": 1.0}\n')
    with Other("chunked") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for _ in range(2):
            tracker = WandbTracker(run, mode="online", finish_timeout=60)
            tracker.log({"train/loss": 1.0}, 1)
            tracker.finish(failed=False)
            assert states(tmp_path) == ["begun"], "of its first part nothing is there"
        assert sent(tmp_path)[0] == ""
    lines = [(line["step"], line["train/loss"]) for line in server.lines["0123456789abcdef"].values() if "step" in line]
    assert set(lines) == {(0, 2.0), (1, 1.0)}
    assert server.summary["0123456789abcdef"]["status"] == "unfinished"


@pytest.mark.slow
@pytest.mark.long
def test_cells_and_their_report_are_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = compose_training(["tracker.mode=online", "tracker.finish_timeout=0.2"])["tracker"]
    sizes = {"lengths": [16, 24], "heads": 1, "head_width": 8, "threads": 1, "device": "cpu", "repeats": 1}
    given = {**sizes, "backends": ["longformer"], "baselines": False, "options": {"longformer": {"window": 4}}}
    config = BenchmarkConfig(**given, budget_s=0.1, tracker=tracker, output=str(tmp_path / "costs"))
    with Server("silent") as broken:
        monkeypatch.setenv("WANDB_BASE_URL", broken.url)
        rows = benchmark(config, Console(file=io.StringIO()))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sent(tmp_path)[0] == ""
    assert len(server.runs) == 3
    for row in rows:
        (line,) = server.history[row["id"]]
        assert line["speed/forward_backward_seconds"] == row["seconds"]
        assert server.summaries[row["id"]]["status"] == "ok"
    pages = [body for name, body in server.files.items() if name.endswith(".html")]
    assert pages == [(tmp_path / "costs" / "report.html").read_bytes()]


def test_what_cannot_be_sent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunInfo(tmp_path / "run", "n", "0123456789abcdef", "full", "s", {}, lambda line: None)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    WandbTracker(run, mode="online", finish_timeout=0.1).finish(failed=True)
    wrong, said = sent(tmp_path)
    assert wrong.startswith("1 of 1 run did not arrive")
    assert said == [f"[1/1] n: cannot be sent: {run.folder} has neither figures nor a result"]
    (run.folder / "result.json").write_text('{"kind": "quality", "id": "other", "status": "ok"}')
    assert sent(tmp_path)[1] == [f"[1/1] n: cannot be sent: {run.folder} holds another run by now"]
    with owning(run.folder):
        wrong, said = sent(tmp_path)
    assert wrong == ""
    assert said[0].startswith("[1/1] n: left alone, process ")
    with pytest.raises(ValueError, match="runs must name folders, got 'nowhere'"):
        sync(SyncConfig(runs="nowhere"))
    (path,) = tmp_path.glob("run/wandb/*.receipt.json")
    path.write_text('{"id": 3')
    assert sent(tmp_path) == ("", [f"{path} is no receipt of a followed run", "no run was followed here"])
    (tmp_path / "none").mkdir()
    assert sent(tmp_path / "none") == ("", ["no run was followed here"])


def test_what_is_switched_off_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    row: Any = run_training(compose_training([*WORDS, "tracker.mode=auto"]), tmp_path / "run")
    assert (row["status"], row["notices"]) == ("ok", [])
    assert sent(tmp_path) == ("", ["no run was followed here"])


def test_a_log_says_what_did_not_arrive(tmp_path: Path) -> None:
    log = tmp_path / "debug-internal.log"
    assert undelivered(log) is None
    fine = (
        '{"level":"INFO","msg":"filestream: closed"}\n{"level":"ERROR","msg":"stream: failed to shut down analytics"}\n'
    )
    log.write_text(fine + "no JSON\n[]\n")
    assert undelivered(log) is None
    log.write_text(fine + '{"level":"ERROR+4","msg":"filestream: fatal error: 401"}\n')
    assert undelivered(log) == "filestream: fatal error: 401"
    log.write_text(fine + '{"level":"ERROR","msg":"runfiles: CreateRunFiles returned error","error":"403"}\n')
    assert undelivered(log) == "runfiles: CreateRunFiles returned error 403"


@pytest.mark.parametrize(
    ("before", "now", "then"),
    [
        (None, "delivered", "delivered"),
        (None, "written", "written"),
        ("begun", "delivered", "begun"),
        ("written", "delivered", "written"),
        ("delivered", "written", "written"),
    ],
)
def test_what_a_run_lacked_before_it_went_on_it_lacks_still(before: Any, now: Any, then: str, tmp_path: Path) -> None:
    """What W&B has of the last part alone is not the whole run."""
    Receipt("one").write(tmp_path)
    ended(tmp_path, "one", None if before is None else Receipt("one", state=before), now)
    found = receipt(tmp_path, "one")
    assert found is not None
    assert found.state == then


def test_a_folder_that_can_only_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    Receipt("id", name="longformer-text").write(tmp_path / "run")
    monkeypatch.setattr("attention_zoo.jobs.sync.owning", refuse)
    wrong, said = sent(tmp_path)
    assert wrong == "1 of 1 run did not arrive; the same command sends them"
    assert said == [f"[1/1] longformer-text: {tmp_path / 'run'}: Read-only file system"]
