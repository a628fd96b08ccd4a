"""Batches drawn in a process of its own while the training computes: the same ones, in the same order.

Worth it where drawing takes a notable share of a step. The place in the data is that of the last batch which was handed
out, not of those that lie ready, so that a run goes on to the same bits with any number of them.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from attention_zoo import stopping
from attention_zoo.tasks.task import Batch, Batches

LEAVE_S = 20
"""How long the process goes on when it is told to stop: it is told by others, too, than by who needs its batches."""


def drawn_ahead(batches: Batches, ahead: int) -> Batches:
    """The same batches.

    Args:
        ahead: how many may lie ready; 0: none, they are drawn when they are asked for.
    """
    return _Ahead(batches, ahead) if ahead else batches


class _Ahead:
    """See `drawn_ahead`. The process begins with the first batch and ends with this object, or with its parent."""

    def __init__(self, batches: Batches, ahead: int):
        self.batches, self.ahead = batches, ahead
        self.state = batches.state_dict()
        self.drawn: Iterator[Any] | None = None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Batch:
        if self.drawn is None:
            loader = DataLoader(
                _Drawing(self.batches),
                batch_size=None,
                num_workers=1,
                prefetch_factor=self.ahead,
                collate_fn=_as_it_is,
                worker_init_fn=_patient,
                generator=torch.Generator(),  # a seed is drawn for the process: not from the run's own numbers
            )
            self.drawn = iter(loader)
        batch, state = pickle.loads(next(self.drawn))
        if isinstance(batch, Exception):
            raise batch
        self.state = state
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def close(self) -> None:
        """End the process; the next batch begins another."""
        self.drawn = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.batches.load_state_dict(state)
        self.state = self.batches.state_dict()


class _Drawing(IterableDataset[Any]):
    """What the process does: each batch, and the place in the data behind it. An error is handed over in its place.

    They travel as bytes: the loader's own queue would wait for ever for what it cannot take apart, and wants as much
    shared memory as lies ready, of which containers have little.
    """

    def __init__(self, batches: Batches):
        self.batches = batches

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                batch = next(self.batches).each(lambda tensor: tensor)  # its mappings become plain ones
                said = pickle.dumps((batch, self.batches.state_dict()))
            except Exception as error:
                yield _handed_over(error)
                return
            yield said


def _handed_over(error: Exception) -> bytes:
    try:
        said = pickle.dumps((error, None))
        pickle.loads(said)
    except Exception:  # of a kind that does not travel
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))
    return said


def _patient(_worker: int) -> None:
    """A terminal and a scheduler tell every process to stop; the training, which saves first, still needs batches."""
    for number in stopping.SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(LEAVE_S))


def _as_it_is(drawn: Any) -> Any:
    return drawn
