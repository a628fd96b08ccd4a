"""Documents that a task shortens to a budget before a model sees them, and what its data say of that.

Where a row is classified it is no wider than what can be left of its documents: it costs what its budget costs, and
`seq_len` says what rows are cut or drawn at where they are whole. What is scored stays the same, so `digest` names the
documents as they were, and shortening competes with mechanisms that read them whole. Where bytes themselves are
predicted, those that are left are another text: `digest` names the shortening, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attention_zoo.tasks.compress import Compression, compression, ranges


def chosen(options: Mapping[str, Any] | None) -> Compression | None:
    """What `task.compress` asks for; None where documents stay whole."""
    return None if options is None else compression(**options)


def told(how: Compression, sizes: Iterable[int] | np.ndarray) -> dict[str, Any]:
    """What was done to documents of these sizes, for `describe`, by their sizes alone.

    `kept_share` is that of their bytes; of the method "extractive", whose sentences seldom fill a budget, the most.
    """
    before = np.fromiter(sizes, np.int64)
    after = np.minimum(before, how.budget)
    about = {"method": how.method, "budget": how.budget} | ({"chunk": how.chunk} if how.method == "chunks" else {})
    share = float(after.sum() / max(1, before.sum()))
    return {**about, "kept_share": share, "documents": len(before), "shortened": int((before > how.budget).sum())}


def packed(documents: Iterable[np.ndarray], how: Compression) -> tuple[np.ndarray, np.ndarray]:
    """What is left of documents, one after another in one array, and where each ends; one is read at a time."""
    left = [np.frombuffer(_left(document, how), np.uint8) for document in documents]
    return np.concatenate(left), np.cumsum([len(each) for each in left], dtype=np.int64)


def _left(document: np.ndarray, how: Compression) -> bytes:
    raw = document.tobytes()  # not by `shortened`, which remembers what it was asked for: these may be whole books
    return b"".join(raw[start:stop] for start, stop in ranges(raw, how))
