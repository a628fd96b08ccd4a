"""Text that is shortened to a budget before a model sees it: what one does with a long document and a short model.

    head        the first bytes
    head_tail   the first and the last, half of the budget each
    chunks      pieces of about `chunk` bytes, evenly spaced from the beginning to the end
    extractive  the most central sentences

Each gives whole ranges of the input's bytes, in their order; what is no longer than the budget passes untouched. A
token is a byte where a model reads bytes.

Extractive: a sentence is a node, joined to the `NEIGHBOURS` that are most similar by the cosine of TF-IDF weights; its
centrality is its PageRank there (LexRank, Erkan and Radev 2004; TextRank, Mihalcea and Tarau 2004). From the most
central down, each is taken that still fits. Deviations: the nearest neighbours stand for a threshold on the similarity,
so that a document of n sentences has O(n) edges; nothing is done against taking a sentence that repeats another.
A sentence ends with a full stop, exclamation or question mark before white space, and with a line. Needs scikit-learn
and networkx: pip install 'attention-zoo[text]'. Eight megabytes take a quarter of a minute.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.rules import OneOf
from attention_zoo.tasks.corpus import File

METHODS = ("head", "head_tail", "chunks", "extractive")
NEIGHBOURS = 8
CHUNK = 64
"""Bytes of a piece, where nothing else is said."""
ROWS = 512
"""Sentences whose similarities to all others are held at a time."""
SENTENCE = re.compile(rb"""[^\n]*?[.!?]["')\]]*\s+|[^\n]*\n\s*|[^\n]+\Z""")

Range = tuple[int, int]
"""[start, stop) of some bytes."""


class Compression(NamedTuple):
    """How documents are shortened; made by `compression`.

    Fields:
        method: see the module.
        budget: bytes of a document that are kept, at most.
        chunk: about how long the pieces are, where the method is "chunks".
    """

    method: str
    budget: int
    chunk: int


class Kept(NamedTuple):
    """Bytes of all documents, before and after."""

    before: int
    after: int

    @property
    def share(self) -> float:
        return self.after / max(1, self.before)


@checked(prefix="task.compress.")
def compression(
    *, method: Annotated[str, OneOf(*METHODS)], budget: Positive, chunk: Positive | None = None
) -> Compression:
    """The choice of a method, checked.

    Raises:
        ValueError: for a wrong option, one that the method has no use for, or a method whose packages are not there.
    """
    if chunk is not None and method != "chunks":
        raise ValueError(f"task.compress.chunk belongs to method=chunks and to no other, got {chunk} for {method}")
    missing = [name for name in ("sklearn", "networkx") if importlib.util.find_spec(name) is None]
    if method == "extractive" and missing:
        raise ValueError(
            f"task.compress.method=extractive needs {' and '.join(missing)}, which is not installed: "
            f"pip install 'attention-zoo[text]'"
        )
    return Compression(method, budget, chunk or CHUNK)


def compressed(documents: Sequence[File], how: Compression) -> tuple[list[File], Kept]:
    """The documents, each shortened, and how much that left."""
    found = [(name, shortened(raw, how)) for name, raw in documents]
    return found, Kept(sum(len(raw) for _, raw in documents), sum(len(raw) for _, raw in found))


@lru_cache(maxsize=4096)
def shortened(raw: bytes, how: Compression) -> bytes:
    """What is kept of one document."""
    return b"".join(raw[start:stop] for start, stop in ranges(raw, how))


def ranges(raw: bytes, how: Compression) -> list[Range]:
    """Which bytes are kept, in order: no more than the budget, never the same twice."""
    if len(raw) <= how.budget:
        return [(0, len(raw))]
    chosen: dict[str, Callable[[], list[Range]]] = {
        "head": lambda: [(0, how.budget)],
        "head_tail": lambda: _spaced(len(raw), how.budget, min(2, how.budget)),
        "chunks": lambda: _spaced(len(raw), how.budget, -(-how.budget // how.chunk)),
        "extractive": lambda: _central(raw, how.budget),
    }
    return chosen[how.method]()


def _spaced(length: int, budget: int, count: int) -> list[Range]:
    """`count` ranges of equal length that add up to the budget, with equal gaps; the first and the last at the ends."""
    bounds = [budget * i // count for i in range(count + 1)]
    gaps = [(length - budget) * i // max(1, count - 1) for i in range(count)]
    return [(gap + start, gap + stop) for gap, start, stop in zip(gaps, bounds, bounds[1:])]


def sentences(raw: bytes) -> list[Range]:
    """The ranges of all sentences, which add up to the whole."""
    return [match.span() for match in SENTENCE.finditer(raw)]


def _central(raw: bytes, budget: int) -> list[Range]:
    found = sentences(raw)
    order = np.argsort(-centrality([raw[start:stop] for start, stop in found]), kind="stable").tolist()
    chosen: list[Range] = []
    for index in order:
        start, stop = found[index]
        if stop - start <= budget:
            chosen.append((start, stop))
            budget -= stop - start
    if not chosen:  # every sentence is longer than the budget
        start, _ = found[order[0]]
        return [(start, start + budget)]
    return sorted(chosen)


def centrality(texts: Sequence[bytes]) -> np.ndarray:
    """[sentences], the PageRank of each among its nearest neighbours; adds up to 1."""
    import networkx
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = [text.decode(errors="replace") for text in texts]
    try:
        weights = TfidfVectorizer(token_pattern=r"\w+").fit_transform(words)
    except ValueError:  # not one word in all of it
        return np.full(len(texts), 1 / len(texts))
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(texts)))
    for first in range(0, len(texts), ROWS):
        similar = (weights[first : first + ROWS] @ weights.T).toarray()
        similar = np.floor(similar * 2**20).astype(np.int64)  # equal ones stay so, and the earlier one is the nearer
        own = np.arange(len(similar))
        similar[own, first + own] = 0
        ranked = similar * len(texts) - np.arange(len(texts))
        nearest = np.argpartition(-ranked, min(NEIGHBOURS, len(texts) - 1), axis=1)[:, :NEIGHBOURS]
        near = np.take_along_axis(similar, nearest, axis=1)
        row, column = np.nonzero(near)
        graph.add_weighted_edges_from(
            zip((first + row).tolist(), nearest[row, column].tolist(), near[row, column].tolist())
        )
    ranks = networkx.pagerank(graph, tol=1e-8, max_iter=500)
    return np.array([ranks[index] for index in range(len(texts))]).round(12)
