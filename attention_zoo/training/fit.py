"""The course of a run: steps, evaluations, checkpoints, and the reasons to stop.

After each step comes what the step calls for: figures, an evaluation, a reason to stop, a checkpoint. Whoever asks the
run to stop waits for the step alone: an evaluation on its way is put off, the checkpoint says so, and the run that goes
on begins with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.options import Finite, Natural, NonNegative, check_fields
from attention_zoo.stopping import Stopped
from attention_zoo.tasks.task import Task
from attention_zoo.tracking.tracker import Tracker
from attention_zoo.training.evaluate import Evaluation, is_better
from attention_zoo.training.groups import TrainerConfig
from attention_zoo.training.progress import Progress
from attention_zoo.training.trainer import NotFinite, Step, Trainer


@dataclass
class History:
    """What a run remembers of itself; part of every checkpoint.

    Fields:
        curve: [step, mean training loss since the point before].
        quality: [step, main metric on the main set].
        readings: of modules that say something of themselves: [step, number, ...] by name; see `following`.
        best: best main metric so far.
        worse: evaluations since then.
        train_seconds: time in steps alone.
        seconds: time in all, evaluations included.
        tokens: read in training.
        sent_bytes: in training, between the processes that share the tokens of a row.
        peak_bytes: of device memory so far; on a CPU of the second step, see `observed`; None before.
        settled: the last step after which all was done that it calls for.
        stopped: why the run ended; None while it has not.
    """

    curve: list[list[Finite]] = field(default_factory=list)
    quality: list[list[Finite]] = field(default_factory=list)
    readings: dict[str, list[list[float]]] = field(default_factory=dict)
    best: Finite | None = None
    worse: Natural = 0
    train_seconds: NonNegative = 0.0
    seconds: NonNegative = 0.0
    tokens: Annotated[int, Field(ge=0)] = 0
    sent_bytes: Annotated[int, Field(ge=0)] = 0
    recent: list[Finite] = field(default_factory=list)
    peak_bytes: Annotated[int, Field(ge=0)] | None = None
    settled: Natural = 0
    stopped: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` gave.

        Raises:
            TypeError: for fields that are not those of a history.
            ValueError: for a value that none can have.
        """
        if state.keys() != asdict(self).keys():
            raise TypeError(f"a history has the fields {', '.join(asdict(self))}")
        check_fields(History, state, "history.")
        self.__dict__.update(asdict(History(**state)))


def fit(
    trainer: Trainer,
    history: History,
    *,
    task: Task,
    steps: int,
    options: TrainerConfig,
    evaluate: Callable[[], Evaluation | None],
    save: Callable[[], None],
    tracker: Tracker,
    progress: Progress,
    asked: Callable[[], Any] = lambda: None,
    step: Callable[[], Step] | None = None,
    clocked: Callable[[float], float] = lambda seconds: seconds,
) -> Evaluation:
    """Train to the end, from wherever trainer and history stand; a run that has ended is only evaluated.

    Args:
        steps: of the whole run.
        options: how often what is done, and when to stop.
        evaluate: scores the model on the main set; None where it was asked to stop on the way.
        save: writes a checkpoint.
        asked: the signal that asks the run to stop, or None; see `stopping.graceful`.
        step: what is called for a step; default the trainer's own.
        clocked: seconds that have passed here -> those that count: of several processes, those of one of them.

    Returns:
        the evaluation after the last step. Why it was the last is in `history.stopped`.

    Raises:
        NotFinite: as `Trainer.step` does, or for a metric that is not finite.
        Stopped: when asked to, with a checkpoint of the last step written.
    """
    latest: Evaluation | None = None
    mark = time.perf_counter()

    def clock() -> float:
        nonlocal mark
        now = time.perf_counter()
        passed, mark = now - mark, now
        history.seconds += passed
        return passed

    def settle() -> Evaluation | None:
        """What the last step calls for; None where there was no evaluation, or where it was put off."""
        done, found = trainer.done, None
        if done % options.eval_every == 0 or done == steps:
            clock()
            found = evaluate()
            clock()
            if found is None:
                return None
        most = options.max_seconds
        # asked before anything is noted: of an answer that never comes nothing may be half noted
        over = most is not None and clocked(history.seconds) >= most
        if found is not None:
            history.stopped = _judge(found, history, done, task, options, tracker, progress)
        if history.stopped is None and over:
            history.stopped = f"time: {most:g} s were over after step {done} of {steps}"
            progress.notice(f"stopped by trainer.max_seconds={most:g} after step {done} of {steps}")
        if history.stopped is None and done >= steps:
            history.stopped = "steps"
        history.settled = done
        return found

    by = None
    while history.stopped is None and by is None:
        if history.settled == trainer.done:
            clock()
            taken = trainer.step() if step is None else step()
            history.train_seconds += clock()
            _note(taken, history, trainer.done, steps, options.log_every, tracker, progress)
        latest = settle()
        by = asked()
        if trainer.done % options.checkpoint_every == 0 or history.stopped is not None or by is not None:
            save()
            clock()
    if by is None and latest is None:
        latest = evaluate()
        by = asked() if latest is None else None
    if by is not None:
        raise Stopped(by)
    assert latest is not None
    return latest


def _note(
    step: Step, history: History, done: int, steps: int, log_every: int, tracker: Tracker, progress: Progress
) -> None:
    """Take note of a step."""
    history.tokens += step.tokens
    history.sent_bytes += step.sent
    history.recent.append(step.loss)
    rate = history.tokens / history.train_seconds
    progress.update(done, step.loss, rate)
    if done % log_every == 0 or done == steps:
        loss = math.fsum(history.recent) / len(history.recent)
        history.curve.append([done, loss])
        history.recent.clear()
        extra = {f"train/{name}": value for name, value in step.auxiliary.items()}
        figures = {"loss": loss, "lr": step.lr, "gradient_norm": step.gradient_norm, "tokens_per_second": rate}
        named = {f"train/{name}": value for name, value in figures.items()}
        tracker.log({"tokens": history.tokens, **named, **extra}, done)


def _judge(
    found: Evaluation,
    history: History,
    step: int,
    task: Task,
    options: TrainerConfig,
    tracker: Tracker,
    progress: Progress,
) -> str | None:
    """Take note of an evaluation; why it ends the run, or None."""
    value = found.metrics[task.metric]
    if not math.isfinite(value):
        others = ", ".join(f"{name} {other:.4g}" for name, other in found.metrics.items() if name != task.metric)
        beside = f", beside {others}" if others else ""
        raise NotFinite(f"{task.metric} on the evaluation set became {value} at step {step}{beside}: stopped")
    history.quality.append([step, value])
    said: dict[str, float | None] = {"tokens": history.tokens}
    said |= {f"evaluate/{name}": metric for name, metric in found.metrics.items()}
    for name, numbers in found.readings.items():
        history.readings.setdefault(name, []).append([step, *numbers])
        said |= {f"readings/{name}" + (f"/{i}" if len(numbers) > 1 else ""): x for i, x in enumerate(numbers)}
    tracker.log(said, step)
    progress.notice(f"step {step}: {task.metric} {value:.4f}, {history.seconds:.0f} s")
    history.worse += 1
    if is_better(task, value, history.best):
        history.best, history.worse = value, 0
    if options.stop_at is not None and not is_better(task, options.stop_at, value):
        return f"stop_at: {task.metric} reached {value:.4f} at step {step}"
    if options.patience is not None and history.worse >= options.patience:
        return f"patience: {task.metric} has not improved on {history.best:.4f} for {history.worse} evaluations"
    return None
