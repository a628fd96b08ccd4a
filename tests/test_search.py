"""A search: what it may be told, that it draws the same again, and that no trial is lost or takes the others along."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from attention_zoo import stopping
from attention_zoo.commands.main import main
from attention_zoo.files import append_jsonl
from attention_zoo.jobs.space import check_space, dimensions, word_of
from attention_zoo.jobs.status import StatusConfig, status
from attention_zoo.jobs.trainings import Run, RunEvent
from attention_zoo.report import read
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

optuna = pytest.importorskip("optuna")

from optuna.exceptions import StorageInternalError  # noqa: E402

from attention_zoo.jobs import study, trials  # noqa: E402 - they need optuna

TINY = [
    "task=mqar", "task.pairs=2", "task.test_examples=4", "tracker=none", "device=cpu", "trainer.progress=none",
    "model.dim=8", "model.heads=2", "model.depth=1", "seq_len=8", "batch=2", "steps=4", "trainer.eval_every=1",
]  # fmt: skip
SHAPE = ("model.dim=8", "model.heads=2", "model.depth=1")
FREE = [word for word in TINY if word not in SHAPE]
"""Without the shape, which a space may name instead."""
RATE = "space.optimizer.lr=[1e-4,1e-1,log]"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1e-4, 1e-2, "log"], "k from 0.0001 to 0.01 (log)"),
        ([0, 1, "uniform"], "k from 0 to 1"),
        ([1, 4, "int"], "k from 1 to 4 (whole)"),
        ([16, 256, "int", "log"], "k from 16 to 256 (whole, log)"),
        (["full", "longformer"], "k one of full, longformer"),
        ([64, 128], "k one of 64, 128"),
        ([["full"], {"name": "longformer", "window": 3}, None], "k one of [full], {name: longformer, window: 3}, null"),
    ],
)
def test_a_range_says_its_kind_and_all_else_is_a_choice(values: list[Any], said: str) -> None:
    (found,) = dimensions({"k": values})
    assert str(found) == said


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space must name at least one field, such as 'space.optimizer.lr="),
        ({"optimizer": {}}, "space must name at least one field"),
        ({"optimizer": {"lr": 3}}, r"space.optimizer.lr must be \[low,high,log\], .* or a list of choices, got 3"),
        ({"optimizer": {"lr": []}}, "space.optimizer.lr must be .*, got \\[\\]"),
        ({"steps": [5]}, "space.steps must have two choices or more, all different, got \\[5\\]"),
        ({"steps": [5, 6, 5]}, "space.steps must have two choices or more, all different"),
        ({"optimizer": {"lr": [1e-2, 1e-4, "log"]}}, "space.optimizer.lr must be a range whose first number is below"),
        ({"optimizer": {"lr": [1.0, 1.0, "uniform"]}}, "must be a range whose first number is below its second"),
        ({"optimizer": {"lr": [0, 1, "log"]}}, "space.optimizer.lr must be a range above 0 for log"),
        ({"optimizer": {"lr": [0.1, "log"]}}, "space.optimizer.lr must be .low,high,log"),
        ({"optimizer": {"lr": [0.1, 1, "log", "uniform"]}}, "space.optimizer.lr must be .low,high,log"),
        ({"optimizer": {"lr": ["full", "int", "log"]}}, "space.optimizer.lr must be .low,high,log"),
        ({"steps": [1.5, 4, "int"]}, "space.steps must be a range of whole numbers for int"),
        ({"task": {"pairs": [2, 3]}}, "space.task.pairs cannot be searched: task is the same for all trials"),
        ({"device": ["cpu", "cuda"]}, "space.device cannot be searched"),
    ],
)
def test_a_space_that_cannot_be_meant(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dimensions(space)


@pytest.mark.parametrize(
    "value",
    [1, 1e-30, -0.5, True, None, "a b", "null", "8@1", "2@1 8@3", 'q"u\\"o\\', "x\\y", "1e5", "", "a,b", ["full", []]],
)
def test_a_value_is_read_back_as_it_was(value: Any) -> None:
    found = OverridesParser.create().parse_override(f"key={word_of(value)}").value()
    found = getattr(found, "text", found)
    assert found == value
    assert type(found) is type(value)


def test_values_that_no_training_takes_are_refused_before_anything_runs() -> None:
    for space, message in (
        ({"optimizer": {"lrr": [1, 2]}}, "space.optimizer.lrr has 1, which is refused: .*lrr.*did you mean lr"),
        ({"optimizer": {"lr": [-1.0, 0.1, "uniform"]}}, "optimizer.lr has -1.0, .* must be a number of at least 0"),
        ({"attention": ["full", "longfromer"]}, "space.attention has longfromer, .*did you mean longformer"),
        ({"model": {"dim": [8, 16, "uniform"]}}, r"an integer .* got 8.0; whole .* space.model.dim=\[8,16,int\]"),
        ({"model": {"heads": [2, 5]}}, "space.model.heads has 5, .* model.heads must divide model.dim"),
    ):
        with pytest.raises(ValueError, match=message):
            check_space(dimensions(space), FREE)
    with pytest.raises(ValueError, match="seed is given and searched"):
        check_space(dimensions({"seed": [1, 2]}), [*TINY, "seed=3"])
    # three heads are right for one of the widths: which trials are not is told by these
    check_space(dimensions({"model": {"heads": [2, 3], "dim": [8, 12]}}), FREE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands here look at no space before they begin, which has a test of its own."""
    monkeypatch.setattr(trials, "check_space", lambda given, words: None)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings run in this process; the list of those that were."""
    trained: list[str] = []

    def run(runs: Sequence[Run], folder: Path, *, on_event: Any, **given: Any) -> list[dict[str, Any]]:
        (one,) = runs
        trained.append(one.name)
        row = run_training(one.config, one.within(folder))
        on_event(RunEvent("waiting", None, None, 0, 1, 0.5, None))
        return [row]

    monkeypatch.setattr(trials, "run_trainings", run)
    monkeypatch.setattr(trials, "WAIT_S", 0.05)
    return trained


def drawn(folder: Path) -> list[tuple[str, dict[str, Any], float | None]]:
    """State, values and result of every trial of the only study beneath."""
    (database,) = folder.glob("search-*/study.db")
    url = f"sqlite:///{database}"
    (found,) = optuna.get_all_study_summaries(url)
    loaded = optuna.load_study(storage=url, study_name=found.study_name)
    return [(trial.state.name, trial.params, trial.value) for trial in loaded.trials]


def test_it_draws_the_same_again_and_goes_on(
    inside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FREE, "model.dim=8", RATE, "space.model.depth=[1,2,int]", "pruner=none"]
    assert main(["search", *words, f"output={tmp_path}/whole", "trials=3"]) == 0
    told = capsys.readouterr().out
    assert main(["search", *words, f"output={tmp_path}/parts", "trials=2"]) == 0
    assert main(["search", *words, f"output={tmp_path}/parts", "trials=3"]) == 0
    whole = drawn(tmp_path / "whole")
    assert whole == drawn(tmp_path / "parts")
    assert len({lr for _, each, _ in whole if (lr := each["optimizer.lr"])}) == 3
    assert inside == ["trial-0000", "trial-0001", "trial-0002"] * 2
    best = max(range(3), key=lambda index: (whole[index][2], -index))
    assert f"best: trial {best}, accuracy {whole[best][2]:.4f}" in told
    again = told.partition("train it again: ")[2].split()
    assert again[:2] == ["attention-zoo", "train"]
    config = compose_training(again[2:])
    (folder,) = (tmp_path / "whole").glob(f"search-mqar-full-*/trial-{best:04d}")
    row = json.loads((folder / "result.json").read_text())
    assert row["config"]["threads"] == config["threads"] == 1, "others would take sums in another order"
    assert row["config"]["optimizer"]["lr"] == config["optimizer"]["lr"] == whole[best][1]["optimizer.lr"]
    assert row["quality_curve"][-1][1] == whole[best][2]
    assert len(read(tmp_path / "whole")) == 3, "a report takes its rows"
    (job,) = status(StatusConfig(str(tmp_path / "whole")), Console(quiet=True))
    assert job.count() == {"done": 3}
    assert job.plan.again().startswith("attention-zoo search")


def test_a_trial_that_fails_is_told_and_the_others_go_on(
    inside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FREE, "space.model.heads=[2,3]", "space.model.dim=[8,12]", "trials=6", f"output={tmp_path}"]
    wrong = {"model.heads": "3", "model.dim": "8"}
    assert main(["search", *words]) == 0
    told = capsys.readouterr()
    found = drawn(tmp_path)
    refused = [number for number, (_, values, _) in enumerate(found) if values == wrong]
    assert refused, "these seeds draw it"
    assert [state for state, _, _ in found].count("FAIL") == len(refused)
    why = "model.heads must divide model.dim, got heads=3 for dim=8"
    assert f"search: trial {refused[0]} (model.heads=3 model.dim=8): failed: {why}" in told.err
    (folder,) = tmp_path.glob(f"search-*/trial-{refused[0]:04d}")
    assert json.loads((folder / "result.json").read_text())["error"] == why
    # a trial of the same values is not trained again
    assert len(inside) == len({tuple(values.items()) for _, values, _ in found}) + len(refused) - 1
    capsys.readouterr()
    assert main(["search", *words, "retry=failed"]) == 0
    assert [state for state, _, _ in drawn(tmp_path)].count("FAIL") == 2 * len(refused), "they were tried again"


def test_what_a_full_disk_ended_is_taken_up_again(
    inside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = trials.run_trainings, ["search", *TINY, RATE, "trials=2", f"output={tmp_path}"]
    full = {"status": "failed", "error": "checkpoint.pt: No space left on device", "final": False}
    monkeypatch.setattr(trials, "run_trainings", lambda runs, folder, **given: [full])
    assert main(words) == 1
    before = drawn(tmp_path)
    assert [state for state, _, _ in before] == ["FAIL", "FAIL"]
    monkeypatch.setattr(trials, "run_trainings", run)
    assert main(words) == 0
    found = drawn(tmp_path)
    assert [state for state, _, _ in found] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert [values for _, values, _ in found[2:]] == [values for _, values, _ in before]


def test_a_database_without_room_is_one_line_and_the_same_command_goes_on(
    inside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_given: Any, **_named: Any) -> None:
        raise StorageInternalError("An exception is raised") from sqlite3.OperationalError("database or disk is full")

    alive, given = optuna.storages.RDBStorage.record_heartbeat, list[int]()

    def once(self: Any, trial_id: int) -> None:
        given.append(trial_id)
        full() if len(given) > 1 else alive(self, trial_id)

    def train(runs: Any, folder: Any, **_named: Any) -> Any:
        while len(given) < 3:
            time.sleep(0.05)
        return run(runs, folder, **_named)

    run, words = trials.run_trainings, ["search", *TINY, RATE, "trials=1", "heartbeat=1", f"output={tmp_path}"]
    with monkeypatch.context() as here:
        here.setattr(trials, "run_trainings", train)
        here.setattr(optuna.storages.RDBStorage, "set_trial_state_values", full)
        here.setattr(optuna.storages.RDBStorage, "record_heartbeat", once)
        assert main(words) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (database,) = tmp_path.glob("*/study.db")
    cannot = "cannot be written: database or disk is full; the same command goes on"
    assert told.splitlines()[-1] == f"error: {database} {cannot}"
    assert main(words) == 0
    assert [state for state, _, _ in drawn(tmp_path)][-1] == "COMPLETE"


def test_nothing_that_ended_well_is_an_error(
    inside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        trials, "run_trainings", lambda runs, folder, **given: [{"status": "oom", "error": "no room for 9 GiB"}]
    )
    assert main(["search", *TINY, RATE, "trials=2", "workers=2", f"output={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "error: none of 2 trials ended well: oom: no room for 9 GiB"
    assert [state for state, _, _ in drawn(tmp_path)] == ["FAIL", "FAIL"]


def test_what_is_worse_than_half_of_the_others_is_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are made up: of the last trial they are the worst from the first evaluation on."""

    def run(runs: Sequence[Run], folder: Path, *, on_event: Any, **given: Any) -> list[dict[str, Any]]:
        (one,) = runs
        value = 0.1 if one.name == "trial-0006" else 0.5
        for step in (1, 2, 3, 4):
            append_jsonl(one.within(folder) / "metrics.jsonl", {"step": step, "evaluate/accuracy": value})
            on_event(RunEvent("waiting", None, None, 0, 1, 0.5, None))
        return [{"status": "ok", "quality_curve": [[4, value]]}]

    monkeypatch.setattr(trials, "run_trainings", run)
    assert main(["search", *TINY, RATE, "trials=7", f"output={tmp_path}"]) == 0
    found = drawn(tmp_path)
    assert [state for state, _, _ in found] == ["COMPLETE"] * 6 + ["PRUNED"]
    (row,) = (json.loads(path.read_text()) for path in tmp_path.glob("search-*/trial-*/result.json"))
    assert (row["status"], row["error"]) == ("timeout", "pruned after step 1 of 4, at accuracy 0.1000")
    (job,) = status(StatusConfig(str(tmp_path)), Console(quiet=True))
    assert [state.kind for state in job.found][-1] == "done", "no failure that could be tried again"


@pytest.mark.slow
@pytest.mark.long
def test_trainings_that_learn_nothing_are_really_ended_early(tmp_path: Path) -> None:
    """At some of the rates nothing is learnt; half of the others are better from the first evaluation on."""
    few = [word for word in TINY if not word.startswith(("steps=", "trainer.eval_every="))]
    how = ["steps=600", "trainer.eval_every=100", "sampler=random", "trials=10", f"output={tmp_path}"]
    assert main(["search", *few, "space.optimizer.lr=[1e-9,0.01,0.011,0.012]", *how]) == 0
    found = drawn(tmp_path)
    pruned = [number for number, (state, _, _) in enumerate(found) if state == "PRUNED"]
    assert pruned
    assert min(pruned) >= 5, "the first ones are what others are judged by"
    for number in pruned:
        (folder,) = tmp_path.glob(f"search-*/trial-{number:04}")
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 600
        row = json.loads((folder / "result.json").read_text())
        assert row["status"] == "timeout"
        assert row["error"].startswith("pruned after step ")


def test_who_is_asked_to_stop_has_the_trial_gone_on_with(
    inside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trials.run_trainings

    def asked(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return run(*given, **named)

    words = ["search", *TINY, RATE, "trials=2", f"output={tmp_path}"]
    monkeypatch.setattr(trials, "run_trainings", asked)
    assert main(words) == stopping.CTRL_C
    *_, line = capsys.readouterr().err.splitlines()
    goes_on = "this goes on from there: attention-zoo search"
    assert line.startswith(f"stopped by Ctrl-C; what is finished is kept, and {goes_on}")
    assert line.endswith(f"'{RATE}' trials=2 output={tmp_path}")
    monkeypatch.setattr(trials, "run_trainings", run)
    assert main(words) == 0
    stopped, *others = drawn(tmp_path)
    assert stopped[0] == "FAIL"
    assert [state for state, _, _ in others] == ["COMPLETE", "COMPLETE"]
    assert others[0][1] == stopped[1], "its values are tried first"
    assert inside == ["trial-0000", "trial-0000", "trial-0002"]


@pytest.mark.parametrize("born", [True, False])
def test_a_trial_without_signs_of_life_is_taken_over(
    inside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, born: bool
) -> None:
    warnings.simplefilter("ignore")  # Optuna tells that nobody gives signs of life for this one
    monkeypatch.setattr(study, "STALE", 1)
    words = ["search", *TINY, RATE, "trials=2", "heartbeat=1", f"output={tmp_path}"]
    ended = study.Study.turn

    def dies(self: study.Study, objective: Any) -> Any:
        """As a process that is killed with its trial begun, or just before its first sign of life."""
        trial = optuna.load_study(study_name=self.name, storage=self.storage).ask()
        trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
        if born:
            self.storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr(study.BEGUN, trial.number)
        raise RuntimeError("killed")

    monkeypatch.setattr(study.Study, "turn", dies)
    assert main(words) == 1
    monkeypatch.setattr(study.Study, "turn", ended)
    assert [state for state, _, _ in drawn(tmp_path)] == ["RUNNING"]
    assert main(words) == 0
    dead, *others = drawn(tmp_path)
    assert dead[0] == "FAIL"
    assert [state for state, _, _ in others] == ["COMPLETE", "COMPLETE"]
    assert dead[1] in [values for _, values, _ in others]


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("nonsense", "sqlite:////nowhere/x.db"):
        assert main(["search", *TINY, RATE, f"output={tmp_path}", f"storage={url}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: storage must be the URL of a database that can be written, got {url}: ")


@pytest.mark.slow
def test_kill_minus_nine_loses_nothing(tmp_path: Path) -> None:
    """Two processes of the same search, one of them killed in the middle of its trial; the other ends all."""
    words = ["search", *TINY, RATE, "steps=80", "trainer.eval_every=40", "trainer.checkpoint_every=2"]
    words += ["trials=2", "heartbeat=1", f"output={tmp_path}"]
    command = [sys.executable, "-m", "attention_zoo", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("search-*/trial-0000/checkpoint.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    second = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first.kill()
    first.wait()
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    found = drawn(tmp_path)
    assert [state for state, _, _ in found].count("COMPLETE") == 2
    assert [state for state, _, _ in found].count("FAIL") == 1
    (row,) = (json.loads(path.read_text()) for path in tmp_path.glob("search-*/trial-0000/result.json"))
    assert row["status"] == "ok"
    assert row["resumed_at"] is not None, "from the checkpoint of the one that was killed"
    assert "best: trial" in out
