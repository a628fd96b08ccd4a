"""An Optuna study that any number of processes share: who begins the next trial, and what becomes of the others.

Whoever begins a trial holds the study's lock until its values are drawn, so that none is begun beyond those that are
wanted, and what is drawn depends on nobody's speed: it is a function of the seed, the trial's number and the trials
before it. A trial whose process gives no sign of life any more is failed by Optuna, and waits again under a new number;
so does one whose process was asked to stop.

Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from attention_zoo.jobs.search import SearchOptions

LOCK, DATABASE = ".study", "study.db"
STALE = 3
"""Signs of life that may fail to come."""
RETRIES = 10
"""How often a trial whose process ends is taken up again: it may be what ends it."""
BUSY_S = 120
"""How long SQLite waits for another writer."""

BEGUN = "begun"
"""Of a trial: its own number, once its first sign of life is written."""

OUTSIDE = "outside"
"""Of a failed trial: whether it was no fault of its own, such as a full disk. The next call takes it up again."""

Turn = Literal["done", "elsewhere", "over"]


class Failed(Exception):
    """A trial came to nothing; the others go on."""


class _Database(RDBStorage):
    """One that may have no room for a sign of life: its thread lives on, and the next may be written."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(SQLAlchemyError, StorageInternalError):
            super().record_heartbeat(trial_id)


class Study:
    """One study, as one process sees it. Threads may share it.

    Args:
        folder: of the search, which every process of it must see.
        name: of the study.
        better: "higher" or "lower".
        options: of the search.

    Raises:
        ValueError: for a database that cannot be opened.
    """

    def __init__(self, folder: Path, name: str, better: str, options: SearchOptions):
        self.folder, self.name, self.options = folder, name, options
        folder.mkdir(parents=True, exist_ok=True)
        url = options.storage or f"sqlite:///{(folder / DATABASE).absolute()}"
        more = {"connect_args": {"timeout": BUSY_S}} if url.startswith("sqlite") else {}
        self.retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
        try:
            with self._lock():
                self.storage = _Database(
                    url,
                    engine_kwargs=more,
                    heartbeat_interval=options.heartbeat,
                    grace_period=STALE * options.heartbeat,
                    heartbeat_stale_trial_callback=self.retry,
                )
                direction: Literal["maximize", "minimize"] = "maximize" if better == "higher" else "minimize"
                optuna.create_study(storage=self.storage, study_name=name, direction=direction, load_if_exists=True)
                for trial in self.standing():
                    if trial.state == TrialState.FAIL and (options.retry or trial.user_attrs.get(OUTSIDE)):
                        self.retry(self._study(0), trial)
        except (SQLAlchemyError, ImportError, StorageInternalError) as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"storage must be the URL of a database that can be written, got {url}: {said}") from None

    def _lock(self) -> FileLock:
        return FileLock(self.folder / LOCK, is_singleton=False)

    def _study(self, number: int) -> optuna.Study:
        """The study as whoever begins this trial sees it."""
        seed = random.Random(f"{self.options.sampler_seed}/{number}").getrandbits(32)
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        pruners = {
            "median": optuna.pruners.MedianPruner,
            "halving": optuna.pruners.SuccessiveHalvingPruner,
            "none": optuna.pruners.NopPruner,
        }
        return optuna.load_study(
            storage=self.storage,
            study_name=self.name,
            sampler=samplers[self.options.sampler](seed=seed),
            pruner=pruners[self.options.pruner](),
        )

    def standing(self) -> list[FrozenTrial]:
        """All trials but those that another took up again."""
        every = self._study(0).get_trials(deepcopy=False)
        again = {number for trial in every for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}
        return [trial for trial in every if trial.number not in again]

    def turn(self, objective: Callable[[optuna.Trial, Callable[[], None]], float]) -> Turn:
        """Begin the next trial and see it through, if one is wanted.

        Args:
            objective: is given the trial, and what it must call once the trial's values are drawn. Raises `Failed` for
                a trial that came to nothing, `optuna.TrialPruned` for one that is not worth going on with.

        Returns:
            "done"; "elsewhere": all are begun, and others are at work on some; "over": all have ended.
        """
        lock, begun = self._lock(), list[int]()

        def see_through(trial: optuna.Trial) -> float:
            begun.append(trial.number)
            self.storage.record_heartbeat(self._id(trial.number))
            trial.set_user_attr(BEGUN, trial.number)
            return objective(trial, lock.release)

        with lock:
            optuna.storages.fail_stale_trials(self._study(0))
            self._fail_unborn()
            standing = self.standing()
            if sum(trial.state != TrialState.WAITING for trial in standing) >= self.options.trials:
                return "elsewhere" if any(trial.state == TrialState.RUNNING for trial in standing) else "over"
            study = self._study(len(self.storage.get_all_trials(self.storage.get_study_id_from_name(self.name))))
            try:
                study.optimize(see_through, n_trials=1, catch=(Failed,))
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                # it gave no sign of life for so long that others took it over, such as on a machine that slept
                if not begun or not study.trials[begun[0]].state.is_finished():
                    raise
            except Exception as error:
                if (wrong := _of_database(error)) is None:
                    raise
                name = "the database of storage=" if self.options.storage else self.folder / DATABASE
                raise OSError(f"{name} cannot be written: {wrong}; the same command goes on") from error
        return "done"

    def _fail_unborn(self) -> None:
        """Take up again what died before its first sign of life, whose absence Optuna never misses.

        Only for who holds the lock: until then nobody else is about to begin a trial.
        """
        study = self._study(0)
        for trial in self.standing():
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(BEGUN) != trial.number:
                self.storage.set_trial_state_values(self._id(trial.number), state=TrialState.FAIL)
                self.retry(study, study.trials[trial.number])

    def _id(self, number: int) -> int:
        """The database's own number of a trial."""
        return self.storage.get_trial_id_from_study_id_trial_number(
            self.storage.get_study_id_from_name(self.name), number
        )

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """A trial as it stands in the database now."""
        return self._study(0).trials[trial.number]

    def again(self, trial: optuna.Trial) -> None:
        """Have a trial that is given up taken up again later, by whatever process."""
        self.retry(self._study(0), self.frozen(trial))


def _of_database(error: BaseException) -> str | None:
    """What a database said, such as that it is full, where that is behind an error: Optuna fails over it again."""
    chain: list[BaseException] = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None and behind not in chain:
        chain.append(behind)
    if not any(isinstance(each, SQLAlchemyError | StorageInternalError) for each in chain):
        return None
    return " ".join(str(chain[-1]).split())[:300]


def original(trial: FrozenTrial) -> int:
    """The number under which a trial was begun first."""
    history = RetryHeartbeatStaleTrialCallback.retry_history(trial)
    return int(history[0]) if history else trial.number
