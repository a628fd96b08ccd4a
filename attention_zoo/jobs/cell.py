"""One training of a sweep, which several processes may want to do: exactly one does, and a dead one's is taken over.

A cell is a folder. `result.json` in it is how it ended; a claim (`locks.CLAIMS`) says that somebody sees to it; the
lock of the folder (`locks.WRITES`) that a process trains; and what is there without any of these was lost on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention_zoo.jobs.alone import train_alone
from attention_zoo.jobs.trainings import finished
from attention_zoo.locks import CLAIMS, Busy, owner, owning
from attention_zoo.measure.nursery import Nursery
from attention_zoo.results.row import Row
from attention_zoo.training.config import check, plain
from attention_zoo.training.records import RESULT
from attention_zoo.training.run import run_folder, run_training

WAIT_S = 0.5
"""Between two looks at a cell that somebody else does."""


@dataclass(frozen=True)
class Cell:
    """One training, and where it goes.

    Fields:
        config: composed conf/train.yaml as plain values.
        folder: of this run alone; the same for all who may do it.
        refused: whether the config cannot be meant: the run says so in its row, and takes no time.
    """

    config: Mapping[str, Any]
    folder: Path
    refused: bool = False

    def within(self, folder: str | None) -> Cell:
        """The same in the folder that was planned for it; None: in its own."""
        return self if folder is None else replace(self, folder=Path(folder))

    def result(self, since: float) -> Row | None:
        """The row that stands for it; None where it is still to be done.

        Args:
            since: seconds since 1970. What was done later is not done again by force=true or retry=failed.
        """
        config = dict(self.config)
        try:
            fresh = (self.folder / RESULT).stat().st_mtime >= since
        except OSError:
            return None
        if fresh:
            config |= {"force": False, "retry": None}
        return finished(config, self.folder)

    def work(
        self, since: float, nursery: Nursery, *, threads: int, patient: bool, look: Callable[[], None]
    ) -> Row | None:
        """Do it, unless it is done; None where somebody else does it.

        Args:
            since: see `result`.
            nursery: of the process that it is trained in.
            threads: of torch, where the config leaves them to the machine.
            patient: wait for whoever does it, and take over if that ends without a result.
            look: see `Nursery.call`.

        Raises:
            OSError: where nothing can be written, naming the folder.
        """
        torch.set_num_threads(threads)  # a launcher's workers have settings of their own; results are named after it
        while True:
            look()
            try:
                with owning(self.folder, names=CLAIMS):
                    if self.refused:
                        return run_training(self.config, self.folder)
                    row = self.result(since)
                    return row or train_alone(nursery, self.config, self.folder, threads=threads, look=look)
            except Busy:
                if not patient:
                    return None
            time.sleep(WAIT_S)

    def busy(self) -> bool:
        """Whether somebody does it now."""
        return owner(self.folder, CLAIMS) is not None or owner(self.folder) is not None


def cell_of(composed: Any, hydra: Any) -> Cell:
    """The cell that a job's config describes.

    Args:
        composed: conf/train.yaml with overrides, by Hydra.
        hydra: Hydra's own part of it.

    Raises:
        ValueError: for a config that is none of a training.
    """
    config = plain(composed, hydra)
    folder = run_folder(config).absolute()
    try:
        return Cell(check(config), folder)
    except ValueError:
        return Cell(config, folder, refused=True)
