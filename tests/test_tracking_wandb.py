"""What a team finds in W&B: each training and each cell as one run, named, grouped, filterable, and nothing lost."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.wandb_server import Server, follow
from rich.console import Console

from attention_zoo.jobs.benchmark import benchmark
from attention_zoo.jobs.following import followed
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.tracking.naming import differing, flat, run_name
from attention_zoo.tracking.tables import pictures
from attention_zoo.tracking.tables import tables as tables_of
from attention_zoo.tracking.workspace import workspace
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

KEY = {"WANDB_API_KEY": "0" * 40}
STEPS = 5
"""That a followed run logs."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key, and nothing else of W&B's or a proxy's of this machine."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    for name, value in {**KEY, "HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)


def config_of(run: dict[str, Any]) -> dict[str, Any]:
    return {name: each["value"] for name, each in json.loads(run["config"]).items()}


def sync(command: str, server: Server) -> None:
    """Do as a message says: `wandb sync ...`."""
    env = {**os.environ, "WANDB_BASE_URL": server.url}
    words = {"shell": True, "env": env, "stdin": subprocess.DEVNULL, "timeout": 60}
    done = subprocess.run(f"{sys.executable} -m {command}", capture_output=True, text=True, **words)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr


def test_a_training_is_one_run_with_all_that_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=text", "attention=longformer", "attention.window=8", "steps=2", "batch=2", "seq_len=32", "threads=1"]
    small = ["model.dim=16", "task.max_bytes=100000", "task.held_out_bytes=20000", "task.evaluation_rows=2"]
    how = ["trainer.progress=none", "trainer.log_every=1", "tracker.artifacts=true", "output=runs/lengths"]
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        row = run_training(compose_training([*words, *small, *how]), tmp_path)
    assert (row["status"], row["notices"]) == ("ok", [])
    ((name, run),) = server.runs.items()
    assert name == row["id"]
    assert run["displayName"] == f"longformer-text-32-s0-window=8-{name[:6]}"
    assert (run["groupName"], run["jobType"]) == ("lengths/text", "longformer")
    config = config_of(run)
    wanted = {"backend": "longformer", "task": "text", "seq_len": 32, "seed": 0, "attention/window": 8, "model/dim": 16}
    assert wanted.items() <= config.items()
    assert not any("." in key or isinstance(value, dict) for key, value in config.items() if key != "_wandb")
    assert server.summaries[name]["status"] == "ok"
    assert server.summaries[name]["final/bits_per_byte"] == row["metrics"]["bits_per_byte"]
    steps = [(line["step"], line["tokens"]) for line in server.history[name] if "train/loss" in line]
    assert steps == [(1, 64), (2, 128)]
    speeds = [line for line in server.history[name] if "speed/train_tokens_per_second" in line]
    assert [line["seq_len"] for line in speeds] == [32]
    tables = {name.partition("_by_")[2].partition("_")[0]: body for name, body in server.files.items()}
    assert json.loads(tables["position"])["data"] == [list(pair) for pair in row["loss_by_position"]]
    assert json.loads(tables["recall"])["columns"] == ["recall", "accuracy", "loss", "answers"]
    assert server.files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert (server.artifacts[0]["artifactTypeName"], server.artifacts[-1]) == ("model", {"committed": True})


@pytest.mark.slow
def test_cells_and_their_report_arrive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = compose_training(["tracker.mode=online"])["tracker"]
    sizes = {"lengths": [16, 24], "heads": 1, "head_width": 8, "threads": 1, "device": "cpu", "repeats": 1}
    given = {**sizes, "backends": ["longformer"], "baselines": False, "options": {"longformer": {"window": 4}}}
    config = BenchmarkConfig(**given, budget_s=0.1, tracker=tracker, output=str(tmp_path / "costs" / "short"))
    console = Console(file=io.StringIO())
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        rows = benchmark(config, console)
        found = len(server.stream)
        assert [row["status"] for row in benchmark(config, console)] == ["ok", "ok"]
    cells = {row["id"]: row for row in rows}
    assert len(server.runs) == 3
    assert len(server.stream) > found, "the report is sent again"
    for name, row in cells.items():
        run = server.runs[name]
        length = row["length"]
        assert run["displayName"].startswith(f"longformer-layer-forward_backward-{length}-float32-window=4-")
        assert (run["groupName"], run["jobType"]) == ("costs/short", "longformer")
        wanted = {"backend": "longformer", "task": "forward_backward", "seq_len": length, "attention/window": 4}
        assert wanted.items() <= config_of(run).items()
        (line,) = server.history[name]
        assert line["seq_len"] == length
        assert line["speed/forward_backward_seconds"] == row["seconds"]
        assert line["memory/forward_backward_peak_bytes"] == row["peak_bytes"]
    (report,) = [run for run in server.runs.values() if run["jobType"] == "report"]
    assert report["displayName"].startswith("report-costs/short-")
    pages = {body for name, body in server.files.items() if name.endswith(".html")}
    assert pages == {(tmp_path / "costs" / "short" / "report.html").read_bytes()}


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    with Server() as server:
        online = follow(tmp_path, {**KEY, "WANDB_BASE_URL": server.url})
        first = len(server.history["0123456789abcdef"])
        offline = follow(tmp_path / "later", {"WANDB_MODE": "offline"})
        sync(f"wandb sync {tmp_path}/later/wandb/offline-run-*", server)
    assert (online["notices"], offline["notices"]) == ([], [])
    lines = server.history["0123456789abcdef"]
    assert list(server.runs) == ["0123456789abcdef"]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(STEPS)] * 2
    assert [line["_step"] for line in lines] == [*range(2 * first)], "it goes on where it was"
    assert any("loss_by_position" in name for name in server.files)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "begins", "finish_s"), [("500", "stream", 4.0), ("silent", "start", 20.0)])
def test_what_a_server_does_not_take_is_synced_later(fault: str, begins: str, finish_s: float, tmp_path: Path) -> None:
    with Server(fault, begins) as broken:
        environment = {**KEY, "WANDB_BASE_URL": broken.url}
        found = follow(tmp_path, environment, started=begins == "stream", finish_s=finish_s)
    assert found["finished"] < finish_s + 2
    assert len(found["notices"]) == 1
    assert found["left"] == []
    named = re.search(r"wandb sync [^;()]*?run-\*|attention-zoo sync", found["notices"][0])
    assert named is not None
    command = named[0] if "wandb" in named[0] else f"wandb sync --include-online {tmp_path}/wandb/run-*"
    with Server() as server:
        sync(command, server)
    lines = server.history["0123456789abcdef"]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(STEPS)]
    assert server.summaries["0123456789abcdef"]["final/loss"] == 2.0
    assert any("loss_by_position" in name for name in server.files)


def test_names_differ_wherever_runs_do() -> None:
    grid = [
        run_name(backend, "text", length, f"s{seed}", identity=f"{number:06x}ffff")
        for number, backend in enumerate(("full", "longformer"))
        for length in (128, 512)
        for seed in (0, 1, 2)
    ]
    assert len(set(grid)) == len(grid)
    assert grid[0] == "full-text-128-s0-000000"
    assert differing("longformer", {"name": "longformer", "window": 256, "sinks": 4, "dilation": [1, 2]}) == [
        "sinks=4", "dilation=1,2",
    ]  # fmt: skip
    assert differing("wide", {"_target_": "attention_zoo.attention.longformer.Longformer", "window": 256}) == []
    assert differing("foreign", {"name": "foreign", "inner": {"name": "full"}}) == ["inner={name:full}"]
    long = run_name("full", "a" * 300, identity="0123456789abcdef")
    assert len(long) == 100
    assert long.endswith("a-012345")


def test_configs_are_flat_and_rows_have_tables() -> None:
    nested = {"model": {"dim": 8, "around": [], "empty": {}}, "seed": 0, "threads": None, "tracker": {"mode": "auto"}}
    assert flat(nested) == {"model/dim": 8, "model/around": [], "model/empty": {}, "seed": 0}
    row = {"by_group": {"distance": [[1, 0.5, 0.7, 9]]}, "curve": [], "loss_by_position": []}
    assert {name: table.data for name, table in tables_of(row).items()} == {
        "tables/accuracy_by_distance": [[1, 0.5, 0.7, 9]]
    }
    (figure,) = pictures([{"kind": "portrait", "backend": "full", "pairs": ["20", "12"]}, {"kind": "speed"}]).values()
    assert figure["data"][0]["z"] == [[2, 0], [1, 2]]


def test_nothing_is_followed_where_nothing_is_asked_for(tmp_path: Path) -> None:
    none = compose_training(["tracker=none"])["tracker"]
    wandb = compose_training(["tracker=wandb"])["tracker"]
    assert followed(None, tmp_path) is None
    assert followed(none, tmp_path) is None
    assert followed(wandb, Path("runs/compare/default"))["group"] == "compare/default"  # type: ignore[index]
    assert followed({**wandb, "group": "mine"}, tmp_path)["group"] == "mine"  # type: ignore[index]
    with pytest.raises(ValueError, match=r"tracker.finish_timeout must be a positive number of seconds, got -1"):
        followed({**wandb, "finish_timeout": -1}, tmp_path)


def test_the_sweep_of_agents_is_made_of_words_that_train_takes() -> None:
    sweep = yaml.safe_load((Path(__file__).parents[1] / "experiments" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    words = [f"{key}={given.get('value') or given['values'][-1]}" for key, given in sweep["parameters"].items()]
    config = compose_training([*words, sweep["command"][-2]])
    assert (config["backend"], config["optimizer"]["lr"], config["seed"]) == ("transformer_xl", 0.004, 2)
    assert config["tracker"]["mode"] == "online"
    assert sweep["metric"]["name"] == "final/bits_per_byte"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of that package
def test_the_workspace_is_code() -> None:
    pytest.importorskip("wandb_workspaces")
    made = workspace("team")
    assert (made.entity, made.project) == ("team", "attention-zoo")
    panels = [panel for section in made.sections for panel in section.panels]
    assert {panel.x for panel in panels if hasattr(panel, "x")} == {"step", "tokens", "seq_len"}
