"""Classification of published documents: rows with one label each, padded or cut to the length that is asked for.

Training takes every row once an epoch, in an order drawn from (seed, epoch); the place in it is one number. Evaluation
takes rows in the order of the files. A row's bytes are read when it is asked for, so a set may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from attention_zoo.contract import Tokens
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.task import Batch, Task, generator


class Rows(Protocol):
    """The rows of one split."""

    labels: np.ndarray
    """[N] int64."""

    def ids(self, row: int, length: int) -> np.ndarray:
        """The first `length` tokens of a row, or all if there are fewer; at least one."""
        ...


class Part:
    """Some rows of others.

    Args:
        chosen: their numbers, in the order they are to have.
    """

    def __init__(self, rows: Rows, chosen: np.ndarray):
        self.rows, self.chosen, self.labels = rows, chosen, rows.labels[chosen]

    def ids(self, row: int, length: int) -> np.ndarray:
        return self.rows.ids(int(self.chosen[row]), length)


class Labelled(Task):
    """Base of tasks that read labelled rows. A subclass gives `parts`, `describe`, a name and a source.

    Attributes:
        length: tokens that all rows have; None where rows are padded or cut to any.
        split_by: the option that may have left a split without rows, for errors.
        validation_rows: rows looked at during training, spread evenly over the split; None takes all. The test set is
            always taken whole.
    """

    objective = "classify"
    metric, better = "accuracy", "higher"
    classes: int
    source: ClassVar[Source]
    length: int | None = None
    split_by: str = ""
    validation_rows: int | None

    @property
    def parts(self) -> Mapping[str, Rows]:
        """Rows for training, validation and test."""
        raise NotImplementedError

    def check(self, seq_len: int) -> None:
        if self.length is not None and seq_len != self.length:
            raise ValueError(f"seq_len must be {self.length}, the tokens of each row of {self.name}, got {seq_len}")
        for split, rows in self.parts.items():
            if not len(rows.labels):
                raise ValueError(f"{self.name}: there are no rows for {split}{self.split_by}: {self.source.help()}")

    def types(self, ids: np.ndarray) -> np.ndarray | None:
        """[B, L] token types of rows; None where there are none."""
        return None

    def width(self, length: int) -> int:
        """Tokens of a row that is asked for with `length`: fewer, where documents are shortened to less."""
        return length

    def batch(self, rows: Rows, chosen: Sequence[int], length: int) -> Batch:
        """Some rows, padded on the right."""
        ids = np.zeros((len(chosen), self.width(length)), np.int64)
        valid = np.zeros(ids.shape, bool)
        for place, row in enumerate(chosen):
            found = rows.ids(row, length)
            ids[place, : len(found)] = found
            valid[place, : len(found)] = True
        types = self.types(ids)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(rows.labels[np.asarray(chosen, np.int64)]),
            None if valid.all() else Tokens.of(torch.from_numpy(valid)),
            torch.ones(len(ids), dtype=torch.bool),
            None if types is None else torch.from_numpy(types),
        )

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> LabelledBatches:
        self.check(seq_len)
        return LabelledBatches(self, self.parts["train"], batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, LabelledSet]:
        self.check(seq_len)
        few = spread(len(self.parts["validation"].labels), self.validation_rows)
        return {
            "validation": LabelledSet(self, Part(self.parts["validation"], few), batch_size, seq_len),
            "test": LabelledSet(self, self.parts["test"], batch_size, seq_len),
        }

    def chance(self, seq_len: int) -> float:
        return 1 / self.classes

    def baselines(self, seq_len: int) -> dict[str, float]:
        likeliest = np.bincount(self.parts["train"].labels, minlength=self.classes).argmax()
        return {"majority": float((self.parts["test"].labels == likeliest).mean())}

    def counts(self) -> dict[str, int]:
        """Rows of each split, for `describe`."""
        return {split: len(rows.labels) for split, rows in self.parts.items()}


def spread(count: int, most: int | None) -> np.ndarray:
    """`most` of `count` numbers, evenly; all of them if None."""
    if most is None or most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


class LabelledBatches:
    """Training batches; a batch at the end of an epoch goes on in the next."""

    def __init__(self, task: Labelled, rows: Rows, batch_size: int, seq_len: int, seed: int):
        self.task, self.rows, self.batch_size, self.seq_len, self.seed = task, rows, batch_size, seq_len, seed
        self.taken = 0
        self.order = lru_cache(maxsize=2)(self._order)

    def __iter__(self) -> LabelledBatches:
        return self

    def _order(self, epoch: int) -> np.ndarray:
        return generator(self.task.name, "order", self.seed, epoch).permutation(len(self.rows.labels))

    def __next__(self) -> Batch:
        places = range(self.taken, self.taken + self.batch_size)
        count = len(self.rows.labels)
        chosen = [int(self.order(place // count)[place % count]) for place in places]
        self.taken += self.batch_size
        return self.task.batch(self.rows, chosen, self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = int(state["taken"])


class LabelledSet:
    """One evaluation set: rows in order, each once."""

    def __init__(self, task: Labelled, rows: Rows, batch_size: int, seq_len: int):
        self.task, self.rows, self.batch_size, self.seq_len = task, rows, batch_size, seq_len

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.rows.labels)
        for start in range(0, count, self.batch_size):
            yield self.task.batch(self.rows, range(start, min(count, start + self.batch_size)), self.seq_len)
