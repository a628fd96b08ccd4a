"""What is saved when a process of a run is gone or does not answer: the last step that was finished here.

Where every process holds the whole model (parallel.data=ddp), whoever is left holds all that a checkpoint does: weights
and averages; generators and the place in the data as they were before the step in flight; and, by parallel.copy_states,
what the rows of all carry. Nobody is asked. The first that comes takes a lock and writes, as long as one process needs
for a checkpoint; the others find the lock taken, or the work done. Weights change in a stretch of a step in which no
process waits for another, so that no error of a peer finds them half changed.

Survivors may stand a step apart, where one has heard all that a step needs and another has not: both are ends of a
step, and the later one stays. Shares of a model (parallel.data=fsdp) are gone with who held them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from attention_zoo.files import Damaged, read_json
from attention_zoo.locks import Busy, Names, owning
from attention_zoo.parallel.stored import STATE
from attention_zoo.parallel.world import Lost, is_lost
from attention_zoo.tracking import JsonlTracker, RunInfo, Tracker
from attention_zoo.training.fit import History
from attention_zoo.training.folder import save_by_one
from attention_zoo.training.resume import Places, remove
from attention_zoo.training.trainer import Trainer

SAVES = Names(".survivor", ".survivor.json")
"""Of the one that saves for all."""


class Unwritten(Tracker):
    """Figures that another process writes, of the last steps: whoever outlives it writes those that it has not.

    Args:
        info: of the run.
        lines: written before.

    Attributes:
        lines: how many there are to be, from the run's beginning.
    """

    def __init__(self, info: RunInfo, lines: int):
        self.info, self.lines = info, lines
        self.recent: list[tuple[Mapping[str, float | None], int]] = []

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        # all log the same, and nobody is more than a step ahead
        self.recent = [each for each in self.recent if each[1] >= step - 1] + [(metrics, step)]
        self.lines += 1

    def result(self, row: Mapping[str, Any]) -> None:
        pass

    def finish(self, *, failed: bool) -> None:
        pass

    def write(self) -> None:
        """Those that are missing. Only for who owns the folder."""
        if not self.recent:
            return
        JsonlTracker.rewind(self.info.folder, self.recent[-1][1], self.lines)
        written = JsonlTracker(self.info)
        missing = self.lines - written.lines
        for metrics, step in self.recent[max(0, len(self.recent) - missing) :]:
            written.log(metrics, step)


@contextmanager
def surviving(
    places: Places, identity: str, data: Any, trainer: Trainer, history: History, figures: JsonlTracker | Unwritten
) -> Iterator[None]:
    """A stretch in which the last finished step is saved where another process is gone or does not answer.

    Args:
        places, identity, data: as of `resume.save`.
        figures: what has been logged.

    Raises:
        Lost: saying what is saved, and if nothing is why.
    """
    try:
        yield
    except Exception as error:
        if trainer.world.size == 1 or not is_lost(error):
            raise
        try:
            said = _save(places, identity, data, trainer, history, figures)
        except (OSError, ValueError) as failed:
            said = f"the last step cannot be saved: {' '.join(str(failed).split())[:200]}"
        lost = error if isinstance(error, Lost) else Lost.because(error, trainer.world.timeout_s)
        raise Lost(f"{lost}; {said}") from error


def _save(
    places: Places, identity: str, data: Any, trainer: Trainer, history: History, figures: JsonlTracker | Unwritten
) -> str:
    if not trainer.done:
        return "no step was finished"
    if not trainer.tells and _step_of(places, identity) < trainer.done:
        return "its share of the model is gone with it, what is kept is the last checkpoint (trainer.checkpoint_every)"
    try:
        with owning(places.folder.parent, names=SAVES):
            if (there := _step_of(places, identity)) >= trainer.done:
                return f"step {there} is saved"
            if trainer.standing().carried is None:
                return (
                    "what its rows carried is gone with it, what is kept is the last checkpoint "
                    "(trainer.checkpoint_every, parallel.copy_states)"
                )
            if isinstance(figures, Unwritten):
                with suppress(Busy):  # process 0 lives, and writes its figures itself
                    with owning(places.folder.parent):
                        figures.write()
            save_by_one((places.folder, places.folder_before), identity, data, trainer, history, figures.lines)
            remove(places.file, places.file_before)
            return f"step {trainer.done} is saved by process {trainer.world.rank}"
    except Busy:
        return "another process saves the last step"


def _step_of(places: Places, identity: str) -> int:
    """Of the newest checkpoint of this run; -1 where there is none."""
    try:
        said = read_json(places.folder / STATE)
    except (Damaged, FileNotFoundError):
        return -1
    return int(said["step"]) if said.get("identity") == identity and isinstance(said.get("step"), int) else -1
