"""Evaluation sets whose rows are longer than those of training, read in parts that are as large as its batches.

Scoring at sixteen times the trained length would otherwise hold sixteen times the memory: a run that fits would end
when all of it is paid for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attention_zoo.tasks.task import Batch


def pieces(batches: Iterable[Batch], tokens: int, processes: int = 1) -> Iterator[Batch]:
    """The same rows in the same order, by so many tokens at a time, at least a row for each process.

    Args:
        batches: whose rows do not go on from one batch to the next.
        processes: that share the rows of a batch.
    """
    for batch in batches:
        length = max(batch.ids.shape[1], 0 if batch.source is None else batch.source.shape[1])
        rows = max(processes, tokens // length)
        if rows >= len(batch.ids):
            yield batch
        else:
            yield from (batch.rows(slice(start, start + rows)) for start in range(0, len(batch.ids), rows))
