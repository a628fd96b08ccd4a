"""Search for the options with which a model learns best: each trial is a training in a process of its own.

A trial is judged by the task's main metric on the set that is looked at during training, never on the test set. Its
folder is as that of any training; a trial that is taken up again goes on from its checkpoint.
"""

from __future__ import annotations

import shlex
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from attention_zoo.files import Damaged, read_jsonl, safe_name
from attention_zoo.jobs.plan import COMMAND, Planned, write_plan
from attention_zoo.jobs.search import SearchOptions
from attention_zoo.jobs.space import Dimension, check_space, dimensions
from attention_zoo.jobs.study import OUTSIDE, Failed, Study, original
from attention_zoo.jobs.trainings import Run, RunEvent, data_of, identity_of, run_trainings, task_name
from attention_zoo.locks import owning
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.environment import device_name
from attention_zoo.measure.identity import identity
from attention_zoo.measure.kept import keep_row, number
from attention_zoo.results.row import Row
from attention_zoo.stopping import Stopped, graceful
from attention_zoo.training.building import build
from attention_zoo.training.config import compose_training, device_of
from attention_zoo.training.records import METRICS, RESULT, lost_row
from attention_zoo.words import say

WAIT_S = 1.0
"""Between two looks at trials that others are at work on."""
NAME_LIMIT = 60


def search(options: SearchOptions, words: Sequence[str]) -> str:
    """Run trials until as many as wanted have ended, then show them all.

    Args:
        words: of the command line that are each trial's, too.

    Returns:
        what went wrong, in one line; empty where at least one trial ended well.

    Raises:
        ValueError: for a space or an option that cannot be meant, before anything runs.
        Stopped: when asked to; the trials in flight have saved where they were and are gone on with.
    """
    given = dimensions(options.space)
    words = [*words, *([] if any(word.startswith("threads=") for word in words) else ["threads=1"])]
    check_space(given, words)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        found = Search(options, words, given)
        with graceful() as asked:
            found.run(asked)
        return found.show(Console())


class Search:
    """One search, as one process sees it."""

    def __init__(self, options: SearchOptions, words: Sequence[str], given: Sequence[Dimension]):
        self.options, self.words, self.given = options, list(words), list(given)
        self.base = compose_training(words)
        task = build(self.base["task"], "task")
        self.metric, self.better = task.metric, task.better
        what: dict[str, Any] = {"base": self.base, "space": [str(each) for each in given], "sampler": options.sampler}
        what |= {"sampler_seed": options.sampler_seed, "pruner": options.pruner}
        name = identity(what, device=device_name(device_of(self.base["device"])), threads=self.base["threads"])
        label = safe_name(f"search-{task.name}-{self.base['backend']}", NAME_LIMIT)
        self.folder = Path(self.base["output"]) / f"{label}-{name}"
        self.study = Study(self.folder, name, self.better, options)
        self.command = COMMAND.get()  # threads have none
        self.error: BaseException | None = None

    def run(self, asked: Callable[[], Any]) -> None:
        """Have all workers at work until every trial has ended.

        Args:
            asked: the signal that asks to stop, or None.
        """
        ended = sum(trial.state.is_finished() for trial in self.study.standing())
        said = "; ".join(map(str, self.given))
        _say(f"{self.options.trials} trials, {ended} of them done, of {said}; in {self.folder}")
        # a child ends with the thread that started it, so that a worker has one thread to its end
        workers = [
            threading.Thread(target=self._work, args=(asked,), daemon=True, name=f"worker {index}")
            for index in range(self.options.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
        if self.error is not None:
            raise self.error

    def _work(self, asked: Callable[[], Any]) -> None:
        def look() -> None:
            if (by := asked()) is not None:
                raise Stopped(by)
            if self.error is not None:
                raise Stopped

        told = False
        try:
            while True:
                look()
                turn = self.study.turn(lambda trial, drawn: self._trial(trial, drawn, look))
                if turn == "over":
                    return
                if turn == "elsewhere":
                    if self.options.workers == 1 and not told:
                        _say("all trials are begun; waiting for those of other processes")
                        told = True
                    time.sleep(WAIT_S)
        except BaseException as error:
            self.error = self.error or error

    def _trial(self, trial: optuna.Trial, drawn: Callable[[], None], look: Callable[[], None]) -> float:
        """The value of a trial: the main metric after the last step."""
        number = original(self.study.frozen(trial))
        chosen = [f"{each.key}={each.suggest(trial)}" for each in self.given]
        label = f"trial {number} ({' '.join(chosen)})"
        place = self.folder / f"trial-{number:04d}"
        trial.set_user_attr("words", chosen)
        try:
            self._plan()
            if (twin := self._twin(trial)) is not None:
                trial.set_user_attr("same_as", original(twin))
                assert twin.value is not None
                return twin.value
            config = compose_training([*self.words, *chosen])
        except ValueError as error:  # this combination cannot be meant
            raise self._failed(trial, self.base, place, Ended("failed", str(error)), label) from None
        finally:
            drawn()
        with owning(place, wait_s=float("inf"), notice=_say):
            pass  # where others have taken it for dead and it was not, it ends there
        watch = _Watch(trial, place, self.metric, int(config["steps"]), look)
        try:
            (row,) = run_trainings(
                [Run(place.name, config)], self.folder, parallel=1, retry=self.options.retry, on_event=watch
            )
            watch.judge()
        except optuna.TrialPruned as pruned:
            _say(f"{label}: {pruned}")
            if not (place / RESULT).is_file():
                self._record(config, place, Ended("timeout", str(pruned)), stopped="pruned")
            raise
        except Stopped:
            self.study.again(trial)
            raise
        if row["status"] == "lost":
            self.study.again(trial)
        if row["status"] != "ok":
            trial.set_user_attr(OUTSIDE, not row.get("final", True))
            raise self._failed(trial, config, place, Ended(row["status"], str(row["error"])), label, written=True)
        value = float(row["quality_curve"][-1][1])
        _say(f"{label}: {self.metric} {value:.4f}")
        return value

    def _plan(self) -> None:
        """Leave word for `status` of the trials that there are, and of those that are still to be drawn."""
        steps, tokens = self.base["steps"], self.base["batch"] * self.base["seq_len"]
        named = {
            f"trial-{trial.user_attrs.get('same_as', original(trial)):04d}": " ".join(trial.user_attrs.get("words", []))
            for trial in self.study.standing()
        }
        named |= {f"trial-next-{index}": "to be drawn" for index in range(self.options.trials - len(named))}
        cells = [
            Planned(f"{name[6:]}: {words}", "training", str(self.folder / name), steps=steps, tokens=tokens)
            for name, words in named.items()
        ]
        write_plan(self.folder, self.command, cells, parallel=self.options.workers)

    def _twin(self, trial: optuna.Trial) -> FrozenTrial | None:
        """A trial of the same values that has ended well."""
        for other in self.study.standing():
            if other.state == TrialState.COMPLETE and other.params == trial.params:
                return other
        return None

    def _failed(
        self,
        trial: optuna.Trial,
        config: Mapping[str, Any],
        place: Path,
        ended: Ended,
        label: str,
        *,
        written: bool = False,
    ) -> Failed:
        trial.set_user_attr("error", f"{ended.status}: {ended.reason}")
        _say(f"{label}: {ended.status}: {ended.reason}")
        if not written:
            self._record(config, place, ended)
        return Failed(ended.reason)

    def _record(self, config: Mapping[str, Any], place: Path, ended: Ended, **more: Any) -> None:
        """The row of a trial whose training has left none."""
        row = lost_row(config, identity_of(config), ended, task=task_name(config), data=data_of(config)) | more
        place.mkdir(exist_ok=True)
        keep_row(place / RESULT, row)

    def show(self, console: Console) -> str:
        """Print all trials, the best first, and the command that trains the best again; what went wrong, if all did."""
        trials = self.study.standing()
        sign = -1 if self.better == "higher" else 1
        # those that ended well by value, then the others by kind; WAITING comes last
        order = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)
        trials.sort(key=lambda trial: (order.index(trial.state), sign * (trial.value or 0), original(trial)))
        table = Table("trial", self.metric.replace("_", " "), *(each.key for each in self.given), "how it ended")
        for trial in trials:
            value = f"{trial.value:.4f}" if trial.state == TrialState.COMPLETE else "–"
            said = dict(word.split("=", 1) for word in trial.user_attrs.get("words", []))
            cells = [_short(said.get(each.key, "")) for each in self.given]
            table.add_row(str(original(trial)), value, *cells, _ending(trial))
        console.print(table)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if not done:
            reasons = [_ending(trial) for trial in trials if trial.state.is_finished()]
            return f"none of {len(trials)} trials ended well: {reasons[0] if reasons else 'none has ended'}"
        best = done[0]
        # threads stay: with others sums are taken in another order, and it would not be this trial
        again = shlex.join(["attention-zoo", "train", *self.words, *best.user_attrs["words"]])
        console.print(f"best: trial {original(best)}, {self.metric} {best.value:.4f}", highlight=False)
        console.print(f"train it again: {again}", highlight=False, soft_wrap=True, markup=False)
        return ""


class _Watch:
    """Reports a training's evaluations to its trial, and ends one that the pruner thinks little of."""

    def __init__(self, trial: optuna.Trial, place: Path, metric: str, steps: int, look: Callable[[], None]):
        self.trial, self.place, self.steps, self.look = trial, place, steps, look
        self.key = f"evaluate/{metric}"
        self.reported = 0

    def __call__(self, event: RunEvent) -> None:
        self.look()
        if event.kind == "waiting":
            self.judge()

    def judge(self) -> None:
        """Report what is new.

        Raises:
            TrialPruned: at the first step whose value the pruner thinks little of; the last is no matter of pruning.
        """
        rows: list[Row] = []
        with suppress(FileNotFoundError, Damaged):  # not begun, or the training says what is wrong
            rows = list(read_jsonl(self.place / METRICS))
        for row in rows:
            step: Any = row.get("step")
            value: Any = row.get(self.key)
            if not number(step) or not number(value) or not self.reported < step < self.steps:
                continue
            self.reported = step
            self.trial.report(float(value), step)
            if self.trial.should_prune():
                raise optuna.TrialPruned(f"pruned after step {step} of {self.steps}, at {self.key[9:]} {value:.4f}")


def _ending(trial: FrozenTrial) -> str:
    if trial.state == TrialState.PRUNED:
        step = max(trial.intermediate_values, default=0)
        return f"pruned after step {step}, at {trial.intermediate_values.get(step, float('nan')):.4f}"
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get("error", "its process was ended again and again"))
    if (twin := trial.user_attrs.get("same_as")) is not None:
        return f"as trial {twin}"
    return trial.state.name.lower() if trial.state != TrialState.COMPLETE else "ok"


def _short(word: str) -> str:
    with suppress(ValueError):
        return f"{float(word):.4g}"
    return word


def _say(line: str) -> None:
    say(f"search: {line}")
