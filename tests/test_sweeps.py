"""Sweeps: who does which cell, what is launched again, what is said before, and what is told of them meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults.reports import peer
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from attention_zoo import stopping
from attention_zoo.commands import work
from attention_zoo.commands.job import Job
from attention_zoo.commands.main import main
from attention_zoo.commands.refusals import of_hydra
from attention_zoo.commands.sweeps import Sweep, at_a_time, starts, told_apart
from attention_zoo.commands.work import Outcome
from attention_zoo.files import Damaged, write_json
from attention_zoo.jobs.alone import train_alone
from attention_zoo.jobs.benchmark import _planned_matches
from attention_zoo.jobs.cell import Cell
from attention_zoo.jobs.needs import Need, needs, start_seconds, summary
from attention_zoo.jobs.plan import PLAN, Plan, Planned, read_plan, write_plan
from attention_zoo.jobs.states import remaining_s, states
from attention_zoo.jobs.status import StatusConfig, status
from attention_zoo.locks import CLAIMS, Busy, owner, owning
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.records import RESULT, blank_row

Words = tuple[str, ...]
A, B, C = ("seed=0", "x=1"), ("seed=1", "x=1"), ("seed=2", "x=1")
TINY = [
    "task=mqar", "task.pairs=2", "task.test_examples=4", "device=cpu", "threads=1", "steps=4", "batch=2", "seq_len=16",
    "model.dim=16", "tracker=none", "trainer.progress=none",
]  # fmt: skip
TIMED = {
    "seconds": [0.5], "start_seconds": 1.0, "evaluation_seconds": 2.0, "scoring_seconds": 5.0, "peak_bytes": 7,
    "disk_bytes": 9,
}  # fmt: skip


def config(*words: str) -> dict[str, Any]:
    return check(compose_training([*TINY, *words]))


class Fake:
    """A launcher that does what a script says: an outcome for each job, or an error for all of a call."""

    def __init__(self, *script: dict[Words, Outcome] | Exception):
        self.script, self.calls = list(script), list[list[Words]]()

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        self.calls.append([tuple(words) for words in jobs])
        said = self.script.pop(0)
        if isinstance(said, Exception):
            raise said
        found = [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]
        for words, each in zip(self.calls[-1], found):
            each.return_value = said[words]
        return found


def swept(launcher: Fake, jobs: Sequence[Words] = (A, B), at_once: int = 10) -> Sweep:
    sweep = Sweep(Job("report", False, "attention-zoo report"))
    sweep.launch(launcher, jobs, at_once)  # type: ignore[arg-type]
    return sweep


OK, BUSY, LOST = Outcome(), Outcome(state="busy"), Outcome(1, "lost", state="lost")


def test_what_somebody_else_does_is_asked_for_again_with_patience() -> None:
    launcher = Fake({A: BUSY, B: OK}, {A: OK})
    sweep = swept(launcher)
    assert launcher.calls == [[A, B], [A]]
    assert sweep.outcomes == {A: OK, B: OK}
    assert sweep.job.patient


def test_what_is_killed_again_and_again_ends_as_lost() -> None:
    launcher = Fake({A: LOST, B: OK}, {A: LOST}, {A: LOST})
    assert swept(launcher).outcomes[A] == LOST
    assert launcher.calls == [[A, B], [A], [A]]


def test_a_launcher_is_given_no_more_at_once_than_it_was_asked_to() -> None:
    launcher = Fake({A: OK, B: BUSY}, {C: OK}, {B: OK})
    swept(launcher, (A, B, C), at_once=2)
    assert launcher.calls == [[A, B], [C], [B]], "what is free goes before what is busy"


def test_a_launcher_that_cannot_launch_is_not_tried_again() -> None:
    launcher = Fake(RuntimeError("no such queue"))
    with pytest.raises(RuntimeError, match="no such queue"):
        swept(launcher)


def test_after_a_dead_worker_the_rest_is_launched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {}
    cells = {words: SimpleNamespace(folder=tmp_path / words[0], result=lambda since, w=words: rows.get(w[0]))
             for words in (A, B)}  # fmt: skip
    launcher = Fake(RuntimeError("a worker died"), {B: OK})

    class Dying(Fake):
        def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
            cells[A].folder.mkdir(exist_ok=True)
            rows["seed=0"] = blank_row({"backend": "full"})
            return launcher.launch(jobs, first)

    sweep = Sweep(Job("train", False, ""))
    sweep.cells = dict(cells)
    sweep.names = {A: "seed=0", B: "seed=1"}
    sweep.job.control = SimpleNamespace(since=0.0, stop=tmp_path / ".stop")  # type: ignore[assignment]
    sweep._rounds(Dying(), (A, B), 10, lambda: None)  # type: ignore[arg-type]
    assert launcher.calls == [[A, B], [B]], "what the dead worker had finished stays so"
    assert set(sweep.outcomes) == {A, B}


def test_a_cell_is_claimed_by_one_and_taken_over_from_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Path] = []
    row = blank_row({"backend": "full"})

    def train(nursery: Any, config: Any, folder: Path, **rest: Any) -> Any:
        assert owner(folder, CLAIMS) is not None
        done.append(folder)
        return row

    monkeypatch.setattr("attention_zoo.jobs.cell.train_alone", train)
    monkeypatch.setattr("attention_zoo.jobs.cell.torch.set_num_threads", lambda threads: None)
    cell = Cell(config(), tmp_path / "a")
    how: Any = {"nursery": None, "threads": 1, "look": lambda: None}
    with owning(cell.folder, names=CLAIMS):
        assert cell.work(0.0, patient=False, **how) is None
        assert cell.busy()
    assert not done
    child = os.fork()
    if child == 0:
        with owning(cell.folder, names=CLAIMS):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (cell.folder / CLAIMS.owner).exists()
    assert cell.work(0.0, patient=False, **how) == row
    assert done == [cell.folder]


def test_who_waits_stops_when_asked(tmp_path: Path) -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise stopping.Stopped(signal.SIGTERM)

    cell = Cell(config(), tmp_path)
    with owning(tmp_path, names=CLAIMS), pytest.raises(stopping.Stopped):
        cell.work(0.0, None, threads=1, patient=True, look=look)  # type: ignore[arg-type]


def test_what_a_sweep_has_done_is_not_forced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("attention_zoo.jobs.cell.finished", lambda config, folder: asked.append(config))
    cell = Cell(config("force=true", "retry=failed"), tmp_path)
    write_json(tmp_path / RESULT, {})
    for since in (0.0, time.time() + 60):
        cell.result(since)
    assert [(each["force"], each["retry"]) for each in asked] == [(False, None), (True, "failed")]


@pytest.mark.parametrize(
    ("ended", "kept"),
    [
        (Ended("oom", "the kernel ended it"), True),
        (Ended("failed", "SIGSEGV"), True),
        (Ended("lost", "SIGKILL"), False),
    ],
)
def test_how_a_process_ended_is_a_result_unless_it_was_killed(ended: Ended, kept: bool, tmp_path: Path) -> None:
    nursery: Any = SimpleNamespace(call=lambda *given, **how: ended)
    given = config()
    row = train_alone(nursery, given, tmp_path / "a", threads=1, look=lambda: None)
    assert (row["status"], row["error"]) == ended
    assert (tmp_path / "a" / RESULT).exists() == kept
    if kept:
        assert Cell(given, tmp_path / "a").result(0.0) is not None, "the next call does not repeat it"


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    given = config("steps=100000", "trainer.log_every=1", "trainer.checkpoint_every=100000")

    def look() -> None:
        if (tmp_path / "a" / "metrics.jsonl").exists():
            # a scheduler tells all processes at once
            assert nursery._server is not None
            os.kill(nursery._server._process.pid, signal.SIGTERM)
            raise stopping.Stopped(signal.SIGTERM)

    with Nursery() as nursery:
        with pytest.raises(stopping.Stopped):
            train_alone(nursery, given, tmp_path / "a", threads=1, look=look)
        assert (tmp_path / "a" / "checkpoint.pt").exists()
        assert owner(tmp_path / "a") is None
        (found,) = states(tmp_path, [Planned("a", "training", "a", steps=100000)])
        assert (found.kind, found.share > 0) == ("waiting", True), "it stopped in good order"
        # the same nursery, or another, does the next
        row = train_alone(nursery, config(), tmp_path / "b", threads=1, look=lambda: None)
    assert row["status"] == "ok", row["error"]
    assert row["wall_seconds"] >= row["train_seconds"] > 0


@pytest.mark.parametrize("requeues", [False, True])
def test_a_worker_saves_on_signals_that_its_launcher_passes_over_or_requeues_by(requeues: bool) -> None:
    heard: list[int] = []

    def theirs(number: int, frame: object) -> None:
        heard.append(number)
        if requeues:
            raise SystemExit(144)

    before = signal.signal(signal.SIGTERM, theirs)
    usual = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit if requeues else stopping.Stopped), stopping.beside():
            _sent(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with pytest.raises(stopping.Stopped, match="SIGUSR1"), stopping.beside():
            _sent(signal.SIGUSR1)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == (theirs, usual)
    finally:
        signal.signal(signal.SIGTERM, before)


def _sent(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "there"), [("'nturl2path', 'no_such_module'", True), ("", False)])
def test_what_a_module_names_is_there_before_its_process_is_forked(
    first: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys\nFIRST = [{first}]\ndef look():\n    return {{'there': 'nturl2path' in sys.modules}}\n"
    (tmp_path / "early.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with Nursery() as nursery:
        assert nursery.call("early:look", {}, timeout_s=60.0) == {"there": there}


def test_children_never_hear_of_ctrl_c_and_this_process_does() -> None:
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    before = signal.signal(signal.SIGINT, stopping._on_signal)
    try:
        with suppress(stopping.Stopped), stopping.graceful() as asked:
            with stopping.ctrl_c_here_alone():
                child = subprocess.Popen(["sleep", "60"])
                child.send_signal(signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                while asked() is None:
                    time.sleep(0.01)
            child.terminate()
            assert child.wait() == -signal.SIGTERM
            assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()


def test_looking_at_a_folder_keeps_nobody_from_it(tmp_path: Path) -> None:
    with owning(tmp_path):
        assert owner(tmp_path, CLAIMS) is None
        with pytest.raises(Busy):
            owning(tmp_path).__enter__()
        with owning(tmp_path, names=CLAIMS):
            assert owner(tmp_path, CLAIMS) == owner(tmp_path, CLAIMS)
    assert owner(tmp_path) is None


# --- said before -----------------------------------------------------------------------------------------------------


def test_jobs_are_told_apart_by_the_words_that_differ() -> None:
    jobs = [("task=mqar", "seed=0", "hydra.a=1"), ("task=mqar", "seed=1", "hydra.a=2")]
    assert told_apart(jobs) == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [({}, (1, True)), ({"n_jobs": 3}, (3, True)), ({"n_jobs": 64}, (8, True)), ({"submitit_folder": "x"}, (8, True)),
     ({"submitit_folder": "x", "array_parallelism": 4}, (4, False)), ({"ray": {"init": {"address": "a:1"}}}, None)],
)  # fmt: skip
def test_how_many_cells_run_at_a_time(launcher: dict[str, Any], expected: tuple[int, bool] | None) -> None:
    found = at_a_time(OmegaConf.create(launcher), 8)
    assert found == expected if expected else found[1] is False


def test_the_line_before_a_sweep() -> None:
    need = Need(60.0, 2**30, 2**20, "measured")
    said = summary([need, need, Need(240.0, 2**31, 2**20, "timed")], 5, 2, 2)
    assert said == (
        "5 cells, 2 of them finished: about 4.00 min with 2 at a time, 2.00 GiB of memory each at most, 3.00 MiB of "
        "disk (2 measured before, 1 from a timed step)"
    )
    assert summary([], 2, 2, 1) == "2 cells, 2 of them finished: nothing is left to do"
    assert summary([], 6, 0, 1, refused=6) == "6 cells, 6 of them refused: nothing is left to do"
    assert "not known before" in summary([need, None], 2, 0, 1)


def test_needs_come_from_rows_of_their_like_else_from_a_timed_step(tmp_path: Path) -> None:
    timed = dict(TIMED)
    nursery: Any = SimpleNamespace(call=lambda *given, **how: timed)
    cells = [Cell(config(f"seed={seed}", "steps=10"), tmp_path / f"a{seed}") for seed in range(2)]
    assert needs(cells, tmp_path, nursery, threads=1) == [Need(1 + 10 * 0.5 + 2.0 + 5.0, 7, 9, "timed")] * 2
    nursery.call = lambda *given, **how: pytest.fail("timed twice")
    row = blank_row(dict(cells[0].config)) | {"id": "x", "steps": 5, "train_seconds": 5.0, "wall_seconds": 10.0}
    write_json(tmp_path / "a0" / RESULT, row | {"scoring_seconds": 3.0})
    assert needs(cells[1:], tmp_path, nursery, threads=1) == [Need(1 + 20.0 + 3.0, 7, 9, "measured")]


def test_what_fails_at_once_takes_no_time_and_is_tried_again(tmp_path: Path) -> None:
    told = iter([{"error": "no such thing"}, dict(TIMED), Ended("timeout", "a step takes long"), dict(TIMED)])
    nursery: Any = SimpleNamespace(call=lambda *given, **how: next(told))
    cells = [Cell(config(f"batch={batch}", "steps=10"), tmp_path / f"a{batch}") for batch in (2, 4, 8)]
    failing, whole, unknown = needs(cells, tmp_path, nursery, threads=1)
    assert failing is not None
    assert failing.source == "failing"
    assert failing.seconds < 1
    assert whole == Need(13.0, 7, 9, "timed")
    assert unknown == Need(13.0, 7, 9, "guessed")  # like what can be trained
    assert "1 that will fail" in summary([failing, whole], 2, 0, 1)
    assert needs(cells[:1], tmp_path, nursery, threads=1)[0] == Need(13.0, 7, 9, "timed")


def test_the_start_of_a_process_is_measured_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def call(function: str, given: Any, **how: Any) -> dict[str, Any]:
        calls.append(function)
        time.sleep(0.2)
        return {}

    nursery: Any = SimpleNamespace(call=call)
    first = start_seconds(tmp_path, nursery)
    assert 0.2 <= first < 2
    assert start_seconds(tmp_path, nursery) == first
    assert len(calls) == 1
    assert summary([Need(5.0, None, None, "timed")], 1, 0, 1, before=2.0).startswith("1 cell: about 7.00 s with 1")
    assert [starts(OmegaConf.create(each)) for each in ({}, {"n_jobs": 2}, {"ray": {}}, {"submitit_folder": "x"})] == [
        0, 2, 2, 2,
    ]  # fmt: skip


FACTOR = 2.0
"""By which a prediction may be off where cells take seconds: they are timed by a few steps, on a machine at work."""


def predicted_and_taken(launcher: str, output: Path) -> tuple[float, float]:
    words = [word for word in TINY if not word.startswith("steps=")]
    words += ["steps=150", "trainer.eval_every=50", f"output={output}"]
    with subprocess.Popen(
        [sys.executable, "-m", "attention_zoo", "train", "-m", "seed=0,1,2", *words, f"hydra/launcher={launcher}"],
        stdout=subprocess.PIPE, text=True,
    ) as sweep:  # fmt: skip
        assert sweep.stdout is not None
        line = next(line for line in sweep.stdout if "cells: about" in line)
        began = time.monotonic()
        sweep.stdout.read()
        assert sweep.wait(timeout=600) == 0
    taken = time.monotonic() - began
    found = re.search(r"about ([\d.]+) (s|min|ms)", line)
    assert found is not None
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "min": 60.0}[found[2]], taken


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_what_a_sweep_will_take_is_what_it_takes(launcher: str, tmp_path: Path) -> None:
    """Of three sweeps one: what other tests take of the cores meanwhile, no prediction knows."""
    tries = []
    for number in range(3):
        predicted, taken = predicted_and_taken(launcher, tmp_path / str(number))
        tries.append(f"{launcher}: predicted {predicted:.1f} s, taken {taken:.1f} s")
        if predicted / FACTOR < taken < predicted * FACTOR:
            return
    pytest.fail("; ".join(tries))


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], []])
def test_a_dry_call_says_it_and_begins_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = dict(TIMED)
    monkeypatch.setattr(Nursery, "call", lambda self, function, given, **how: timed)
    assert main(["train", *TINY, f"output={tmp_path}", "dry=true", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 cells: about " if words else "1 cell: about 10.0 s with 1 at a time, 7.00 B of memory")
    assert "from a timed step" in said
    assert not list(tmp_path.glob("mqar-*"))


# --- told meanwhile --------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A sweep with a cell in each state but running."""
    row = blank_row({"backend": "full"}) | {"id": "x", "steps": 10, "train_seconds": 4.0, "wall_seconds": 5.0}
    write_json(tmp_path / "done" / RESULT, row | {"metrics": {"accuracy": 0.5}})
    write_json(tmp_path / "failed" / RESULT, row | {"status": "failed", "error": "boom"})
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "metrics.jsonl").write_text('{"step": 5, "train/tokens_per_second": 100}\n')
    (tmp_path / "stale").mkdir()
    write_json(tmp_path / "stale" / RESULT, row)
    names = ("done", "failed", "lost", "waiting", "going")
    cells = [Planned(name, "training", str(tmp_path / name), steps=10, tokens=20) for name in names]
    cells.append(Planned("stale", "training", str(tmp_path / "stale"), id="y"))
    write_plan(tmp_path / "sweep" / "x", "attention-zoo train -m seed=0,1 dry=true", cells, parallel=2)
    return tmp_path


def test_jobs_that_share_a_folder_plan_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = ([Planned(name, "cell", str(tmp_path / f"{name}.json"))] for name in "abc")
    command = "attention-zoo benchmark -m head_width=16,32"
    write_plan(tmp_path, command, first)
    write_plan(tmp_path, command, second)
    write_plan(tmp_path, command, first)
    assert sorted(each.name for each in read_plan(tmp_path / PLAN).cells) == ["a", "b"]
    write_plan(tmp_path, "attention-zoo benchmark -m head_width=64", third)
    assert [each.name for each in read_plan(tmp_path / PLAN).cells] == ["c"], "another command begins anew"
    monkeypatch.setattr("attention_zoo.jobs.plan.source_digest", lambda: "other")
    write_plan(tmp_path, "attention-zoo benchmark -m head_width=64", first)
    assert [each.name for each in read_plan(tmp_path / PLAN).cells] == ["a"], "other code names cells otherwise"
    write_plan(tmp_path, "attention-zoo benchmark", second)
    write_plan(tmp_path, "attention-zoo benchmark", third)
    assert [each.name for each in read_plan(tmp_path / PLAN).cells] == ["c"], "one job says all that it does"


def test_matches_with_peers_are_cells_too(tmp_path: Path) -> None:
    asked = BenchmarkConfig(backends=["longformer"], lengths=[16, 32], threads=1, peers=True, against=["sdpa"])
    planned = _planned_matches(asked.matches(), tmp_path, asked.rounds)
    assert [each.kind for each in planned] == ["match"] * 4, "two lengths, causal and two-sided"
    assert planned[0].name.endswith("forward_backward against sdpa")
    write_json(Path(planned[0].place), peer() | {"id": planned[0].id})
    write_json(Path(planned[1].place), peer() | {"id": "of other code"})
    write_plan(tmp_path, "attention-zoo benchmark peers=true", planned)
    (job,) = status(StatusConfig(str(tmp_path)), Console(quiet=True))
    assert job.count() == {"done": 1, "waiting": 3}


def test_the_states_of_cells_are_read_from_their_folders(plan: Path) -> None:
    folder = plan / "sweep" / "x"
    with owning(plan / "going", names=CLAIMS):
        found = states(folder, read_plan(folder / PLAN).cells)
    assert [state.kind for state in found] == ["done", "failed", "lost", "waiting", "running", "waiting"]
    assert found[2].share == 0.5
    assert str(os.getpid()) in found[4].who
    assert remaining_s(found, 2) == pytest.approx((2.5 + 5 + 5 + 5) / 2), "as long as the one that is through took"
    moved = folder.parent / "moved"
    folder.rename(moved)
    assert states(moved, read_plan(moved / PLAN).cells)[0].kind == "done"


def test_status_lists_them_and_says_how_to_go_on(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"runs={plan}"]) == 0
    said = capsys.readouterr().out
    assert "6 cells: 1 done, 3 waiting, 1 failed, 1 lost; about" in said
    assert "goes on with: attention-zoo train -m seed=0,1\n" in said
    assert "failed ones again with: attention-zoo train -m seed=0,1 retry=failed\n" in said
    assert "boom" in said
    assert "accuracy 0.500" in said


def test_status_shows_runs_without_a_plan_and_refuses_what_holds_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (job,) = status(StatusConfig(str(tmp_path)), Console(quiet=True))
    assert [state.kind for state in job.found] == ["lost"]
    for runs, said in ((str(tmp_path / "no"), "must name folders"), ([], "must be a folder"), (3, "must be a folder")):
        with pytest.raises(ValueError, match=said):
            status(StatusConfig(runs), Console(quiet=True))
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / RESULT).write_text('{"score": 3}')
    (tmp_path / "foreign" / PLAN).write_text(NOWHERE)
    for name in ("empty", "foreign"):
        with pytest.raises(ValueError, match="runs must hold sweeps"):
            status(StatusConfig(str(tmp_path / name)), Console(quiet=True))


def test_watching_ends_when_nothing_is_left_to_do(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        for name in ("lost", "waiting", "going"):
            write_json(plan / name / RESULT, json.loads((plan / "done" / RESULT).read_text()))
        write_json(plan / "stale" / RESULT, json.loads((plan / "done" / RESULT).read_text()) | {"id": "y"})

    monkeypatch.setattr("attention_zoo.jobs.status.time.sleep", sleep)
    (job,) = status(StatusConfig(str(plan), watch=True, every=0.5), Console(quiet=True))
    assert job.count() == {"done": 5, "failed": 1}


NOWHERE = '{"command": "", "where": "", "cells": [{"name": "a", "kind": "training", "place": "a\\u0000"}]}'


@pytest.mark.parametrize(
    "content", ["", "[]", '{"command": 3}', '{"command": "", "where": "", "cells": [{}]}', NOWHERE]
)
def test_a_damaged_plan_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(Damaged, match=r"plan\.json"):
        read_plan(tmp_path / PLAN)


def test_the_command_that_goes_on_can_be_typed_anywhere() -> None:
    assert Plan("zoo train", os.getcwd(), []).again("retry=failed") == "zoo train retry=failed"
    assert Plan("zoo train retry=failed", "/x", []).again("retry=failed") == "cd /x && zoo train retry=failed"
    assert Plan("", "/x", []).again() == ""


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_jobs_of_a_sweep_that_share_a_folder_take_turns(mode: RunMode, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Any] = [Busy("process 3 works in x"), Busy("process 3 works in x"), "done"]

    def job() -> Any:
        end = ends.pop(0)
        if isinstance(end, Busy):
            raise end
        return end

    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: SimpleNamespace(mode=mode)))
    monkeypatch.setattr(work, "WAIT_S", 0.0)
    if mode == RunMode.MULTIRUN:
        assert work._in_turn(job) == "done"
    else:
        with pytest.raises(Busy, match="process 3 works in x"):
            work._in_turn(job)


TRACKED = """
import os, signal, sys
from joblib import Parallel, delayed
from joblib.externals.loky.backend.resource_tracker import _resource_tracker
from attention_zoo.commands import launchers

if "calm" in sys.argv:
    launchers.start(type("JoblibLauncher", (), {})())
assert Parallel(n_jobs=2)(delayed(abs)(each) for each in (-1, 2)) == [1, 2]
os.kill(_resource_tracker._pid, signal.SIGKILL)
assert Parallel(n_jobs=2)(delayed(abs)(each) for each in (3, -4)) == [3, 4]
"""


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "calm"])
def test_a_killed_tracker_of_joblib_is_no_traceback(word: str) -> None:
    done = subprocess.run([sys.executable, "-c", TRACKED, word], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ("Traceback" in done.stderr) == (not word), done.stderr


def test_a_launcher_of_ray_names_its_extra() -> None:
    error: Any = type("MissingConfigException", (Exception,), {"__module__": "hydra.errors"})("no")
    error.missing_cfg_file = "hydra/launcher/ray"
    assert of_hydra(error) == "hydra/launcher=ray needs pip install 'attention-zoo[ray]'"
