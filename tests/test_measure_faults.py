"""What may happen around a measurement: kills, stopped parents, damaged rows, full disks, two writers, odd settings."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.cells import DAMAGES, Home, _left, _marked
from rich.console import Console
from test_compare import tiny_run
from unruly import installed

from attention_zoo import files
from attention_zoo.jobs import benchmark as job
from attention_zoo.jobs import trainings
from attention_zoo.jobs.benchmark import benchmark
from attention_zoo.jobs.progress import outcome
from attention_zoo.locks import Busy, owning
from attention_zoo.measure import cells as runner
from attention_zoo.measure import nursery
from attention_zoo.measure.cell import SpeedCell, run_cell
from attention_zoo.measure.cells import run_cells
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.measure.ends import Ended, oom_kills
from attention_zoo.measure.environment import canonical_device
from attention_zoo.measure.kept import keep_row, read_rows
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.peers.contest import run_contest
from attention_zoo.measure.peers.matches import Match

ROOT = Path(__file__).parents[1]
TINY = {"heads": 2, "head_width": 8, "threads": 1}
QUICK = {"repeats": 1, "budget_s": 0.01}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("plugin")) as folder:
        yield folder


@pytest.fixture
def at_home(monkeypatch):
    monkeypatch.setattr(runner, "Nursery", Home)


def config(output: Path, **given) -> BenchmarkConfig:
    small = {"backends": ["full"], "baselines": False, "lengths": [4, 8], "device": "cpu", "memory_limit_gib": 1.0}
    return BenchmarkConfig(**{**small, **TINY, **QUICK, "output": str(output), **given})


def quiet() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


# --- rows that cannot be read ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def row():
    made = run_cell(SpeedCell("full", 8, **TINY), **QUICK)
    return {**made, "wall_seconds": 1.0, "limits": {"timeout_s": 1.0, "memory_limit_bytes": None}}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_row_is_named_in_one_line_and_left_out(tmp_path, row, name):
    path = tmp_path / f"{row['id']}.json"
    keep_row(path, row)
    assert read_rows(tmp_path, "speed", pytest.fail) == [files.plain(row)]
    DAMAGES[name](path, random.Random(0))
    told = []
    assert read_rows(tmp_path, "speed", told.append) == []
    (line,) = told
    assert line.startswith(str(path)) or f"'{path}'" in line
    assert "\n" not in line
    assert len(line) < len(str(path)) + 400
    keep_row(path, row)  # whatever lies there
    assert read_rows(tmp_path, "speed", pytest.fail) == [files.plain(row)]


@pytest.mark.usefixtures("at_home")
def test_a_benchmark_names_what_it_cannot_read_once_and_goes_on(tmp_path):
    first = benchmark(config(tmp_path), quiet())
    (tmp_path / "cells" / f"{first[0]['id']}.json").write_text("{")
    (tmp_path / "cells" / "foreign.json").write_text("[]")
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "torn.json").write_text('{"kind": "peer"}')
    (tmp_path / "budgets" / "folder.json").mkdir(parents=True)
    (tmp_path / "cells" / ".torn.json.0123abcd").write_text("of a writer that was killed")
    console = quiet()
    second = benchmark(config(tmp_path), console)
    said = console.export_text()
    for name in (f"{first[0]['id']}.json", "foreign.json", "torn.json", "folder.json"):
        assert said.count(name) == 1, name
    assert [row["status"] for row in second] == ["ok", "ok"]
    assert second[1] == first[1]
    assert not list((tmp_path / "cells").glob(".*"))


# --- statuses --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("status", ["lost", "failed", "oom", "timeout", "unsupported"])
def test_only_what_was_lost_is_measured_again_by_itself(tmp_path, status):
    made = [SpeedCell("full", 8, **TINY)]
    (ok,) = run_cells(made, tmp_path, **QUICK)
    path = tmp_path / "cells" / f"{ok['id']}.json"
    kept = {**ok, "status": status, "error": "why", "seconds": None}
    files.write_row(path, kept)
    (again,) = run_cells(made, tmp_path, **QUICK)
    assert again["status"] == ("ok" if status == "lost" else status)
    files.write_row(path, kept)
    (again,) = run_cells(made, tmp_path, retry="failed", **QUICK)
    assert again["status"] == ("unsupported" if status == "unsupported" else "ok")


@pytest.mark.slow
def test_a_limit_that_is_too_small_is_out_of_memory_and_no_failure(plugin):
    with Nursery() as many:
        for mebibytes in (0.01, 2, 8):
            made = SpeedCell("longformer", 512, **TINY, phase="train_step")
            found = many.run(made, timeout_s=60, memory_limit_bytes=int(mebibytes * 2**20), **QUICK)
            assert found["status"] == "oom", (mebibytes, found["error"])
        bad = SpeedCell("unruly", 8, options={"mood": "error"}, **TINY)
        found = many.run(bad, timeout_s=60, memory_limit_bytes=2**29, **QUICK)
        assert (found["status"], found["error"]) == ("failed", "RuntimeError: boom")


def test_what_fails_within_a_limit_and_not_with_more_is_out_of_memory(monkeypatch):
    with Nursery() as many:
        made, limits = SpeedCell("full", 8, **TINY), []

        def call(function, given, *, timeout_s):
            limits.append(given["memory_limit_bytes"])
            return Ended("failed", "SystemError: odd") if len(limits) == 1 else {"status": "ok"}

        monkeypatch.setattr(many, "call", call)
        monkeypatch.setattr(nursery, "default_limit", lambda device: 2**30)
        found = many.run(made, timeout_s=9, memory_limit_bytes=2**20)
        assert limits == [2**20, 2**30]
        assert (found["status"], found["error"]) == ("oom", "not within 1.0 MiB, though with more: SystemError: odd")
        limits.clear()
        assert many.run(made, timeout_s=9, memory_limit_bytes=2**30)["status"] == "failed", "there is no more"


@pytest.mark.slow
def test_a_kill_is_out_of_memory_only_where_the_kernel_says_so(plugin, tmp_path, monkeypatch):
    assert oom_kills() >= 0
    count = iter(range(10**6))
    monkeypatch.setattr(nursery, "oom_kills", lambda: next(count))
    (found,) = run_cells([SpeedCell("unruly", 8, options={"mood": "killed"}, **TINY)], tmp_path, timeout_s=60, **QUICK)
    assert found["status"] == "oom"
    assert "oom_kill" in found["error"]


@pytest.mark.slow
def test_no_limit_on_time_and_a_worker_that_is_killed_between_two_cells(plugin, tmp_path):
    with Nursery() as many:
        made = SpeedCell("full", 8, **TINY)
        assert many.run(made, timeout_s=math.inf, **QUICK)["status"] == "ok"
        many._server._process.kill()
        assert many.run(made, timeout_s=math.inf, **QUICK)["status"] == "ok"
        assert many.call("os:getcwd", {}, timeout_s=9) == Ended(
            "failed", "exit code 0 before there was a result: it said nothing"
        )
    (found,) = run_cells([made], tmp_path, timeout_s=math.inf, **QUICK)
    assert found["limits"]["timeout_s"] is None
    assert read_rows(tmp_path / "cells", "speed", pytest.fail) == [found]


def test_a_worker_that_cannot_start_costs_rows_and_not_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("attention_zoo.measure.servers.child_command", lambda *a, **k: [str(tmp_path / "no python")])
    found = run_cells([SpeedCell("full", length, **TINY) for length in (4, 8)], tmp_path, **QUICK)
    assert [each["status"] for each in found] == ["failed", "failed"]
    assert "cannot be run: No such file or directory" in found[0]["error"]


# --- processes -------------------------------------------------------------------------------------------------------

SLOW = """
import sys
from attention_zoo.measure.cells import SpeedCell, run_cells
cell = SpeedCell("unruly", 8, options={"mood": "slow"}, heads=2, head_width=8, threads=1)
print(run_cells([cell], sys.argv[1], timeout_s=float(sys.argv[2]), repeats=1)[0]["status"])
"""


def _started(script: str, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, env=env)


def _count(mark: str, wanted: int, seconds: float = 60) -> int:
    until = time.monotonic() + seconds
    while len(_left(mark)) != wanted and time.monotonic() < until:
        time.sleep(0.1)
    return len(_left(mark))


@pytest.mark.slow
def test_a_cell_ends_in_its_time_while_its_parent_is_stopped(plugin, tmp_path):
    with _marked() as mark:
        parent = _started(SLOW, str(tmp_path), "3")
        try:
            assert _count(mark, 3) == 3, "the parent, its worker and the cell"
            os.kill(parent.pid, signal.SIGSTOP)
            assert _count(mark, 2) == 2, "the cell has ended"
            os.kill(parent.pid, signal.SIGCONT)
            assert parent.communicate(timeout=60)[0].endswith("timeout\n")
        finally:
            parent.kill()
            parent.communicate()


TRAIN = """
import json, sys
from attention_zoo import stopping
from attention_zoo.jobs.trainings import Run, run_trainings
stopping.install()
runs = [Run(each["name"], each["config"]) for each in json.load(open(sys.argv[1]))]
try:
    run_trainings(runs, sys.argv[2])
except KeyboardInterrupt as stop:
    sys.exit(stop.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_trainings_end_with_the_comparison_and_go_on_from_where_they_were(tmp_path, number, code):
    runs = [tiny_run(name, steps=100_000, window=4) for name in ("one",)]
    asked = tmp_path / "runs.json"
    asked.write_text(json.dumps([vars(run) for run in runs]))
    with _marked() as mark:
        parent = _started(TRAIN, str(asked), str(tmp_path))
        until = time.monotonic() + 90
        while not all((run.within(tmp_path) / "metrics.jsonl").exists() for run in runs) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(parent.pid, number)
        parent.communicate(timeout=60)
        assert parent.returncode == code
        assert _count(mark, 0, 15) == 0
    assert not (runs[0].within(tmp_path) / "result.json").exists()


def test_a_training_that_was_asked_to_stop_is_lost_and_no_failure(tmp_path):
    run = tiny_run("one")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(75)"])
    process.wait()
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe no UTF-8")
    child = trainings._Child(run, tmp_path, process, kills=oom_kills())
    found = trainings._result(child)
    assert (found["status"], found["task"]) == ("lost", "mqar")
    assert "goes on from its checkpoint" in found["error"]
    process.returncode = 1
    (tmp_path / "result.json").unlink()
    assert trainings._result(child)["status"] == "failed"


def test_a_training_without_a_finite_figure_is_told():
    told = {"status": "ok", "metrics": {"valid_loss": "nan", "share": 0.5}, "steps": 3, "train_seconds": 1.0}
    assert outcome(told).startswith("valid loss nan, share 0.500; 3 steps")


@pytest.mark.slow
def test_contenders_that_die_are_rows_and_the_others_go_on(plugin):
    def match(backend: str, length: int, **options) -> Match:
        made = SpeedCell(backend, length, options=options, causal=True, phase="forward", **TINY)
        return Match(made, ("sdpa",))

    moods = {"killed": "lost", "leave": "failed", "slow": "timeout", "error": "failed"}
    many = [match("unruly", 16 * n, mood=mood) for n, mood in enumerate([*moods, "parricide", "chatter"], 1)]
    with _marked() as mark:
        found = run_contest([*many, match("full", 128)], rounds=1, timeout_s=4)
        assert _count(mark, 0, 15) == 0
    assert [each["status"] for each in found] == [
        *moods.values(),
        "lost",
        "failed",
        "ok",
    ]  # garbage on its own socket: failed
    assert all("\n" not in (each["error"] or "") for each in found)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_home")
def test_one_benchmark_a_folder(tmp_path):
    with owning(tmp_path), pytest.raises(Busy, match=f"process {os.getpid()} on .* works in {tmp_path}"):
        benchmark(config(tmp_path), quiet())
    assert len(benchmark(config(tmp_path), quiet())) == 2


@pytest.mark.usefixtures("at_home")
def test_where_nothing_can_be_written_the_error_names_the_path_and_older_files_stay(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(OSError, match="file"):
        benchmark(config(tmp_path / "file"), quiet())
    assert (tmp_path / "file").read_text() == "somebody's"
    with pytest.raises(ValueError, match="output must be a path"):
        benchmark(config(Path("a\0b")), quiet())

    benchmark(config(tmp_path), quiet())
    # the plan is of what was asked for last
    files_there = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "plan.json"]
    before = {path: path.read_bytes() for path in files_there}

    replace = os.replace

    def full(source, target):
        if "cells" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*cells/\w+\.json'"):
        benchmark(config(tmp_path, lengths=[4, 16]), quiet())
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before if path.exists()} == before


def test_asked_to_stop_a_benchmark_writes_what_there_is(tmp_path, monkeypatch):
    class Interrupted(Home):
        def run(self, cell, **how):
            if cell.length == 8:
                raise KeyboardInterrupt
            return super().run(cell, **how)

    monkeypatch.setattr(runner, "Nursery", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config(tmp_path), quiet())
    (kept,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kept["length"] == 4
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(KeyboardInterrupt):  # at once: what was written before stays
        benchmark(config(tmp_path, lengths=[8]), quiet())
    assert json.loads((tmp_path / "results.jsonl").read_text()) == kept
    with owning(tmp_path):
        pass


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"timeout_s": math.nan}, "timeout_s must be a finite number above 0, got nan"),
        ({"timeout_s": 0.0}, "timeout_s must be a number above 0, got 0.0"),
        ({"budget_s": -1.0}, "budget_s must be a number of at least 0, got -1.0"),
        ({"memory_limit_gib": math.inf}, "memory_limit_gib must be a finite number above 0, got inf"),
        ({"memory_limit_gib": 0.0}, "memory_limit_gib must be a number above 0, got 0.0"),
        ({"threads": 100_000}, "threads must be at most 1024, got 100000"),
        ({"repeats": 0}, "repeats must be an integer of at least 1"),
        ({"retry": "all"}, "retry must be one of failed, got 'all'"),
        ({"device": "cpu:x"}, "device must be cpu, cuda or cuda:<number>, got 'cpu:x'"),
        ({"budget": "1GiB", "phases": ["forward"]}, "phases must hold forward_backward or train_step with a budget"),
        ({"backends": ["x/../../../up"]}, "backends must be one of"),
        (
            {"backends": ["full/../up"]},
            "backends must name kernels that there are, got 'full/../up': full: kernel",
        ),
        ({"backends": ["transformer_xl/rwo"]}, "got 'transformer_xl/rwo': kernel must be one of auto"),
        ({"options": {"full": 3}}, "options.full must be a mapping, got 3"),
        ({"lengths": []}, r"must leave a cell to measure, got backends=\['full'\], lengths=\[\]"),
        ({"phases": []}, r"must leave a cell to measure, .*phases=\[\]"),
        ({"lengths": [64], "quadratic_up_to": 32}, r"lengths=\[64\], .* and quadratic_up_to=32"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_there(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        job.benchmark(config(tmp_path / "out", **given), quiet())
    assert not (tmp_path / "out").exists()


def test_a_cell_may_take_as_long_as_it_takes(tmp_path):
    assert config(tmp_path, timeout_s=None).how()["timeout_s"] == math.inf
    assert config(tmp_path, timeout_s=9.0).how()["timeout_s"] == 9.0


def test_a_device_has_one_name():
    assert [canonical_device(each) for each in ("cpu", "cpu:0", "cuda", "cuda:1")] == [
        "cpu", "cpu", "cuda", "cuda:1"
    ]  # fmt: skip
    assert SpeedCell("full", 8, device="cpu:0") == SpeedCell("full", 8, device="cpu")
    for wrong in ("", "meta", "cpu:3", "cuda:٣", "tpu", 3, None):
        with pytest.raises(ValueError, match="device must be"):
            canonical_device(wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warmup": 10**400}, "warmup: must be less than or equal to"),
        ({"repeats": 1e-320}, "repeats: must be an integer, got 1e-320"),
        ({"variant": {"a": 1}}, "variant: must be a string, got"),
        ({"variant": "core"}, "variant must be that of its config, got 'core'"),
        ({"batch": True}, "batch: must be an integer, got True"),
        ({"batch": 2}, "batch must be that of its config, got 2"),
        ({"environment": {"cpu": 3}}, "environment.cpu: must be a string, got 3"),
    ],
)
def test_a_kept_row_that_could_not_be_drawn_is_not_kept(tmp_path, change, said):
    cell = SpeedCell("full", 8, **TINY)
    row = {**run_cell(cell, **QUICK), "wall_seconds": 1.0, "limits": {"timeout_s": 1.0, "memory_limit_bytes": None}}
    keep_row(tmp_path / f"{row['id']}.json", row)
    told: list[str] = []
    assert len(read_rows(tmp_path, "speed", told.append)) == 1
    (tmp_path / f"{row['id']}.json").write_text(json.dumps({**row, **change}))
    assert read_rows(tmp_path, "speed", told.append) == []
    assert re.search(said, told[0])
