"""Where evidence stands in a row: every arrangement of blocks among single fillers is equally likely."""

from __future__ import annotations

import numpy as np


def scattered(
    random: np.random.Generator, rows: int, blocks: int, width: int, columns: int, sizes: np.ndarray | None = None
) -> np.ndarray:
    """[rows, blocks], rising: the first column of each block of `width` among `columns`, none over another.

    What is arranged are `blocks` blocks and the fillers left beside them, so that no place is likelier than another.

    Args:
        sizes: [rows, 1], how many of the columns each row has; None: all.
    """
    saved = blocks * (width - 1)
    keys = random.random((rows, columns - saved))
    if sizes is not None:
        keys = np.where(np.arange(columns - saved) < sizes - saved, keys, 2.0)
    chosen = np.sort(np.argpartition(keys, blocks - 1, axis=1)[:, :blocks], axis=1)
    return chosen + (width - 1) * np.arange(blocks)


def shuffled(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """[rows, count]: a random order of 0...count-1 for each row."""
    return np.argsort(random.random((rows, count)), axis=1)
