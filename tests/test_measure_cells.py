"""Cells in real processes: limits, crashes, what is skipped and what is stale; and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from unruly import ENDS, installed

from attention_zoo.commands.main import main
from attention_zoo.measure import cells as runner
from attention_zoo.measure import identity, predict
from attention_zoo.measure.cell import SpeedCell, blank_row, run_cell
from attention_zoo.measure.cells import read_cells, run_cells
from attention_zoo.measure.config import BenchmarkConfig, register
from attention_zoo.measure.ends import how_it_ended, ran_out_of_memory

ROOT = Path(__file__).parents[1]
TINY = {"heads": 2, "head_width": 8, "threads": 1}
QUICK = {"repeats": 1, "budget_s": 0.01}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A package from elsewhere that registers the backend "unruly" by its entry point."""
    with installed(tmp_path_factory.mktemp("plugin")) as folder:
        yield folder


def unruly(mood: str) -> SpeedCell:
    return SpeedCell("unruly", 16, options={"mood": mood}, **TINY)


@pytest.mark.slow
def test_whatever_happens_is_a_row_and_the_next_cell_runs(plugin, tmp_path):
    told = []
    rows = run_cells(
        [unruly(mood) for mood in ENDS],
        tmp_path,
        timeout_s=4,
        memory_limit_bytes=2**29,
        on_event=told.append,
        **QUICK,
    )
    assert {mood: row["status"] for mood, row in zip(ENDS, rows)} == ENDS
    reasons = {mood: row["error"] for mood, row in zip(ENDS, rows)}
    assert "SIGABRT" in reasons["crash"]
    assert reasons["slow"] == reasons["deaf"] == "not through within 4 s"
    assert reasons["exit"] == "exit code 1: SystemExit: 3"
    assert reasons["leave"].startswith("exit code 0 before there was a result: ")
    assert reasons["killed"] == "ended from outside by SIGKILL; the next call does it again"
    assert "can't allocate memory: you tried to allocate 1073741824 bytes" in reasons["greedy"]
    assert reasons["good"] is None
    assert all("\n" not in (row["error"] or "") for row in rows)
    assert [event.kind for event in told] == ["started", "finished"] * len(ENDS)
    assert {event.total for event in told} == {len(ENDS)}
    assert {path.stem for path in (tmp_path / "cells").iterdir()} == {row["id"] for row in rows}


@pytest.fixture
def at_home(monkeypatch):
    """Cells run in this process: for tests of what surrounds them."""

    class Home:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def run(self, cell, *, timeout_s, memory_limit_bytes, **how):
            return run_cell(cell, **how)

    monkeypatch.setattr(runner, "Nursery", Home)


def test_finished_cells_are_skipped_and_their_rows_kept(at_home, tmp_path):
    cells = [SpeedCell("full", 32, kernel="sdpa", **TINY), SpeedCell("full", 16, kernel="dense", **TINY)]
    told = []
    first = run_cells([*cells, cells[0]], tmp_path, **QUICK)
    again = run_cells([*cells, cells[0]], tmp_path, on_event=told.append, **QUICK)
    assert first == again
    assert [row["length"] for row in first] == [32, 16, 32]
    assert [event.kind for event in told] == ["skipped", "skipped"]
    forced = run_cells(cells[:1], tmp_path, force=True, **QUICK)
    assert forced[0]["id"] == first[0]["id"]
    assert forced[0]["wall_seconds"] != first[0]["wall_seconds"]
    assert len(read_cells(tmp_path)) == 2


def test_the_row_says_what_was_measured_and_where(tmp_path):
    cell = SpeedCell("full", 24, kernel="sdpa", phase="decode", batch=3, **TINY)
    (row,) = run_cells([cell], tmp_path, timeout_s=60, memory_limit_bytes=2**30, **QUICK)
    expected = {
        "kind": "speed", "id": cell.identity(), "backend": "full", "status": "ok", "error": None, "variant": "layer",
        "kernel": "sdpa", "length": 24, "batch": 3, "heads": 2, "head_width": 8, "dim": 16, "causal": True,
        "phase": "decode", "device": "cpu", "dtype": "float32", "threads": 1, "repeats": 1, "reserved_bytes": None,
        "limits": {"timeout_s": 60, "memory_limit_bytes": 2**30},
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["state_bytes"] >= 2 * 3 * 24 * 16 * 4  # keys and values
    assert row["environment"]["source"] == identity.source_digest()
    assert row["environment"]["threads"] == 1
    told = {key: row["environment"][key] for key in ("wait_policy", "spin_count")}
    names = {"wait_policy": "OMP_WAIT_POLICY", "spin_count": "GOMP_SPINCOUNT"}
    users = {key: os.environ.get(name) for key, name in names.items()}
    assert told == (users if any(users.values()) else {"wait_policy": "PASSIVE", "spin_count": "2000"})
    assert SpeedCell(**row["config"]) == cell
    assert json.loads((tmp_path / "cells" / f"{row['id']}.json").read_text()) == row


def test_a_cell_of_other_code_is_stale_and_measured_again(at_home, tmp_path, monkeypatch):
    cell = SpeedCell("full", 8, **TINY)
    (old,) = run_cells([cell], tmp_path, **QUICK)
    monkeypatch.setattr(identity, "source_digest", lambda: "edited")
    told = []
    run_cells([cell], tmp_path, on_event=told.append, **QUICK)
    assert [event.kind for event in told] == ["stale", "started", "finished"]
    assert told[0].row == old


def test_what_was_lost_is_done_again_what_ran_out_only_within_wider_limits_and_failures_when_asked():
    def final(status: str, now: dict, retry: str | None = None) -> bool:
        then = {"timeout_s": 10.0, "memory_limit_bytes": 1000}
        return runner._is_final({"status": status, "limits": then}, {**then, **now}, retry)

    for status in ("ok", "unsupported"):
        assert final(status, {})
        assert final(status, {}, "failed")
    assert not final("lost", {})
    for status in ("failed", "oom", "oom_predicted", "timeout"):
        assert final(status, {})
        assert not final(status, {}, "failed")
    for status in ("oom", "oom_predicted"):
        assert final(status, {"memory_limit_bytes": 1050})
        assert not final(status, {"memory_limit_bytes": 2000})
        assert not final(status, {"memory_limit_bytes": None})
    assert final("timeout", {"memory_limit_bytes": 2000})
    assert not final("timeout", {"timeout_s": 20.0})
    assert not final("timeout", {"timeout_s": None})


# --- prediction ------------------------------------------------------------------------------------------------------


def done(length: int, status: str = "ok", peak: int | None = None, seconds: float = 1.0, **more):
    cell = SpeedCell("full", length, **{**TINY, **more})
    row = {**blank_row(cell, status, None if status == "ok" else "why"), "peak_bytes": peak, "seconds": seconds}
    return cell, {**row, "wall_seconds": 7 * seconds + 1}


def test_a_materialised_matrix_over_the_limit_is_counted_and_not_run(tmp_path):
    cell = SpeedCell("full", 100_000, kernel="dense", **TINY)
    (row,) = run_cells([cell], tmp_path, memory_limit_bytes=2**30)
    assert row["status"] == "oom_predicted"
    assert "149.0 GiB of tensors (scores and weights, both L x L), over the limit of 1.0 GiB" in row["error"]
    assert row["wall_seconds"] < 1
    assert row["seconds"] is None
    assert row["predicted_bytes"] == 2 * 2 * 100_000**2 * 4


def test_memory_is_extended_from_shorter_cells_of_the_same_series():
    wanted = SpeedCell("full", 800, **TINY)
    shorter = [done(200, peak=2_000), done(100, peak=1_000)]
    assert predict.over_budget(wanted, shorter, 8_000) is None
    excess = predict.over_budget(wanted, shorter, 7_999)
    assert "from 100 and 200 tokens" in excess.why
    assert excess.predicted_bytes == 8_000
    square = [done(100, peak=1_000), done(200, peak=4_000)]
    assert predict.over_budget(wanted, square, 64_000) is None
    assert predict.over_budget(wanted, square, 63_999) is not None
    assert predict.over_budget(wanted, [done(100, peak=1_000)], 7_999) is not None
    assert predict.over_budget(wanted, [done(100, peak=1_000, batch=2)], 7_999) is None
    assert predict.over_budget(wanted, square, None) is None


def test_what_was_too_much_for_a_shorter_cell_is_too_much_for_a_longer_one():
    wanted = SpeedCell("full", 800, **TINY)
    assert "400 tokens did not fit" in predict.over_budget(wanted, [done(400, "oom")], None).why
    assert "400 tokens timed out" in predict.too_slow(wanted, [done(400, "timeout")])
    assert predict.too_slow(wanted, [done(400, "failed"), done(1600, "timeout")]) is None


def test_the_time_left_follows_growth():
    assert predict.expected_wall_s([SpeedCell("full", 8, **TINY)], [], 4.0) is None
    known = [done(100, seconds=0.1), done(200, seconds=0.4)]
    left = predict.expected_wall_s([SpeedCell("full", 400, **TINY)], known, 1e9)
    assert left == pytest.approx(1 + 7 * 1.6)
    assert predict.expected_wall_s([SpeedCell("full", 400, **TINY)], known, 1.0) == pytest.approx(1 + 3 * 1.6 + 1)
    doomed = [*known, done(300, "timeout")]
    assert predict.expected_wall_s([SpeedCell("full", 400, **TINY)], doomed, 1.0) == 0


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_refused_memory_is_told_from_other_errors(error, memory):
    assert ran_out_of_memory(error) is memory


@pytest.mark.parametrize(
    ("code", "said", "for_memory", "status", "reason"),
    [
        (2, "", False, "failed", "exit code 2: it said nothing"),
        (0, "bye", False, "failed", "exit code 0 before there was a result: bye"),
        (-11, "a\n\n b \nExtension modules: numpy", False, "failed", "ended by SIGSEGV: b"),
        (-6, "what():  std::bad_alloc\nmore", False, "oom", "ended by SIGABRT: what():  std::bad_alloc"),
        (1, "Error\nMemoryError", False, "oom", "exit code 1: MemoryError"),
        (1, "beware: out of memory", False, "failed", "exit code 1: beware: out of memory"),
        (-9, "", False, "lost", "ended from outside by SIGKILL; the next call does it again"),
        (-9, "", True, "oom", "the kernel ended it for want of memory (its own counter, oom_kill, says so)"),
        (-15, "MemoryError", False, "lost", "ended from outside by SIGTERM; the next call does it again"),
        (-24, "", False, "lost", "ended from outside by SIGXCPU; the next call does it again"),
        (-40, "", False, "lost", "ended from outside by signal 40; the next call does it again"),
    ],
)
def test_how_a_process_without_a_result_ended(code, said, for_memory, status, reason):
    assert how_it_ended(code, said, killed_for_memory=for_memory) == (status, reason)


# --- the grid and the command line -----------------------------------------------------------------------------------


def test_the_grid_holds_both_baselines_and_spares_long_quadratic_cells():
    config = BenchmarkConfig(backends=["longformer", "full"], lengths=[64, 16], quadratic_up_to=16, device="cpu")
    found = [(cell.backend, cell.kernel, cell.length) for cell in config.cells()]
    assert found == [
        ("full", "dense", 16), ("full", "sdpa", 16), ("longformer", "auto", 16), ("longformer", "auto", 64),
    ]  # fmt: skip
    config.baselines = False
    assert {cell.kernel for cell in config.cells()} == {"auto"}
    config.backends = None
    assert {"bigbird", "full", "reformer", "transformer_xl"} < {cell.backend for cell in config.cells()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backends": ["longfromer"]}, "did you mean longformer"),
        ({"options": {"longformer": {"window": -1}}}, "window must be an integer of at least 1, got -1"),
        ({"options": {"longformer": {"windw": 1}}}, "windw is not supported.*did you mean window"),
        ({"options": {"longfromer": {"window": 1}}}, "options must be of a measured backend"),
        ({"phases": ["forwards"]}, "phase must be one of"),
        ({"device": "cuda:99"}, "device"),
        ({"lengths": [0]}, "length must be"),
        ({"heads": 0}, "heads must be"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused_before_anything_runs(given, said):
    with pytest.raises(ValueError, match=said):
        BenchmarkConfig(**{"backends": ["longformer"], "lengths": [16], "device": "cpu", **given}).cells()


def command(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", "PYTHONPATH": str(path)},
    )


@pytest.mark.slow
def test_the_command_measures_a_new_backend_untouched_and_writes_its_results(plugin, tmp_path):
    arguments = (
        "backends=[unruly]", "+options.unruly.mood=good", "lengths=[16,32]", "heads=2", "head_width=8", "threads=1",
        "repeats=1", "budget_s=0.01", "device=cpu", f"output={tmp_path}/out",
    )  # fmt: skip
    told = [command(*arguments, path=plugin) for _ in range(2)]
    assert [each.returncode for each in told] == [0, 0], told[0].stderr
    assert "[6/6] unruly 32 forward_backward: " in told[0].stdout
    for shown in ("full/dense", "full/sdpa", "unruly", "beats"):
        assert shown in told[0].stdout
    assert "6 of 6 cells were finished already" in told[1].stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["backend"], row["length"], row["status"]) for row in rows] == [
        (backend, length, "ok") for length in (16, 32) for backend in ("full", "full", "unruly")
    ]
    header, *lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert header.startswith("kind,backend,status")
    assert len(lines) == 6
    assert not (ROOT / "outputs").exists()


def test_the_command_explains_itself_and_refuses_in_one_line(tmp_path, capsys):
    assert main(["benchmark", "--help"], "python -m experiments.benchmark") == 0
    helped = capsys.readouterr().out
    for word in ("python -m experiments.benchmark", "backends", "lengths", "memory_limit_gib", "force"):
        assert word in helped
    assert main(["benchmark", "backends=[longfromer]", f"output={tmp_path}/out"]) == 2
    wrong = capsys.readouterr().err
    assert wrong.strip().count("\n") == 0
    assert "did you mean longformer?" in wrong
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["lenghts=[3]", "lengths=[a]", "batch=two", "repeats=0.5"])
def test_misspelt_and_mistyped_settings_are_refused_by_name(override):
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        with pytest.raises(Exception, match=override.partition("=")[0]) as caught:
            compose("benchmark", [override])
    assert isinstance(caught.value, (HydraException, OmegaConfBaseException))


def test_the_defaults_of_the_yaml_are_those_of_the_schema():
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        composed = compose("benchmark")
    assert composed.tracker._target_ == "attention_zoo.tracking.NoTracker"
    assert OmegaConf.to_object(OmegaConf.merge(composed, {"tracker": None})) == BenchmarkConfig()
