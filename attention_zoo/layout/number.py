"""Number tokens on the host, as `Tokens.of` does it on a device: each document from 0, a row's first from its start."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from attention_zoo.layout.host import Host


def numbered(
    valid: Bool[np.ndarray, "B L"],
    is_global: Bool[np.ndarray, "B L"],
    document: Int[np.ndarray, "B L"] | None,
    start: Int[np.ndarray, " B"],
) -> Host:
    """Positions and lengths of tokens whose documents never fall along a row; None: one document."""
    begin, count = start[:, None], valid.cumsum(1)
    flags = is_global & valid
    if document is None:
        position = (begin + count - 1).clip(min=0)
        length = np.broadcast_to(begin + count[:, -1:], valid.shape) if valid.shape[1] else position
        return Host(position, valid, flags, np.zeros_like(position), length)
    filled = np.where(valid, document, -1)
    running = np.maximum.accumulate(filled, 1) if filled.shape[1] else filled
    before = np.concatenate([np.full((len(filled), 1), -1), running[:, :-1]], 1)[:, : filled.shape[1]]
    first = valid & (running != before)
    base = np.maximum.accumulate(np.where(first, count - 1, 0), 1) if filled.shape[1] else count
    index = (first.cumsum(1) - 1).clip(min=0)
    shift = np.where(index == 0, begin, 0)
    totals = np.zeros_like(count)
    np.add.at(totals, (np.arange(len(valid))[:, None], index), valid)
    length = np.take_along_axis(totals, index, 1) + shift
    return Host((count - 1 - base + shift).clip(min=0), valid, flags, running.clip(min=0), length)
