"""Strings that came before: near-duplicates of training among documents, and bytes that could be copied from the row.

A shingle is a string of a fixed number of bytes, named by a 64-bit polynomial hash modulo 2^64 of random numbers that
stand for the bytes: with S_i = sum over j < i of r(byte j) m^j and m odd, the shingle at i is (S_{i+n} - S_i) m^-i, so
that all of a text take one pass of additions. Two different shingles meet with a chance of about 2^-64 each.

Near-duplicates: a document for evaluation of which more than a share of its 50-byte shingles stand anywhere in training
is left out, rather than the training document, so that what is trained on does not depend on what is evaluated.

Recall hits (Arora et al. 2023 count those of bigrams): the bytes of a row that end a string of nine or more bytes which
stood in the same row before; the group is the distance d to the latest time. A model that copies from d bytes ago has
them right, whatever it knows of the text.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from attention_zoo.tasks.corpus import File
from attention_zoo.tasks.task import generator

SHINGLE = 50
CONTEXT = 8
"""Bytes before a recall hit that stood before the earlier one, too."""
MULTIPLIER = 0x9E3779B97F4A7C15
CHUNK = 2**20
MOST = 2**24
"""Shingles of training that are held at a time: 128 MiB."""


def shingles(data: np.ndarray, size: int) -> np.ndarray:
    """uint64, the hash of each string of `size` bytes along the last axis: [..., L - size + 1]."""
    if data.shape[-1] < size:
        return np.zeros((*data.shape[:-1], 0), np.uint64)
    table = generator("shingles").integers(0, 2**64, 256, dtype=np.uint64)
    powers, inverses = _powers(data.shape[-1])
    sums = np.cumsum(table[data] * powers, axis=-1, dtype=np.uint64)
    found = sums[..., size - 1 :].copy()
    found[..., 1:] -= sums[..., :-size]
    return found * inverses[: found.shape[-1]]


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """m^j and m^-j modulo 2^64 for j < count."""
    found = []
    for base in (MULTIPLIER, pow(MULTIPLIER, -1, 2**64)):
        factors = np.full(count, base, np.uint64)
        factors[:1] = 1
        found.append(np.cumprod(factors, dtype=np.uint64))
    return found[0], found[1]


@lru_cache(maxsize=4)
def known_share(files: tuple[File, ...], seen: tuple[File, ...]) -> np.ndarray:
    """[files], the share of each file's shingles that stand in a file of `seen`; 0 for a file shorter than one.

    Of a text of more than `MOST` bytes only those shingles count whose hash is a multiple of some number.
    """
    every = max(1, -(-sum(len(raw) for _, raw in seen) // MOST))
    known = _all(seen, every)
    share = np.zeros(len(files))
    for index, (_, raw) in enumerate(files):
        mine = np.unique(_of(raw, every))
        if len(mine) and len(known):
            at = np.searchsorted(known, mine).clip(max=len(known) - 1)
            share[index] = (known[at] == mine).mean()
    return share


@lru_cache(maxsize=2)
def _all(files: tuple[File, ...], every: int) -> np.ndarray:
    """The shingles of all files, sorted; kept, since several parts are compared with the same training."""
    found = [np.zeros(0, np.uint64)]
    for _, raw in files:
        for start in range(0, len(raw), CHUNK):
            found.append(_of(raw[start : start + CHUNK + SHINGLE - 1], every))
    return np.sort(np.concatenate(found))


def _of(raw: bytes, every: int) -> np.ndarray:
    found = shingles(np.frombuffer(raw, np.uint8), SHINGLE)
    return found if every == 1 else found[found % np.uint64(every) == 0]


def recall_distance(rows: np.ndarray) -> np.ndarray:
    """[B, L]: how far before each byte the same byte stood after the same `CONTEXT` bytes, the latest time; else -1."""
    found = np.full(rows.shape, -1, np.int64)
    hashes = shingles(rows, CONTEXT + 1)
    if hashes.shape[1] > 1:
        order = np.argsort(hashes, axis=1, kind="stable")
        inside = np.take_along_axis(hashes, order, axis=1)
        row, at = np.nonzero(inside[:, 1:] == inside[:, :-1])
        later, earlier = order[row, at + 1], order[row, at]
        found[row, later + CONTEXT] = later - earlier
    return found
