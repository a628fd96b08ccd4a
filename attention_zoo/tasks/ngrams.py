"""The bar for a model of bytes: n-grams of the same training bytes, counted and smoothed (Witten and Bell 1991).

    p(x | c) = (n(c x) + D(c) p(x | c')) / (n(c) + D(c))

n counts, D(c) is the number of different bytes seen after c, c' is c without its first byte; below the empty context
every byte has 1/256. An order-3 n-gram has contexts of three bytes. Counting 8 MB takes about two seconds.

A model that does not beat it has not been trained enough to say anything of attention.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attention_zoo.tasks.corpus import Corpus

ORDER = 3


def bits_per_byte(train: Corpus, data: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Mean bits of the bytes at `places` in `data`, given the three before each, by the name of the rule.

    Args:
        train: counted.
        places: indices; the first bytes of `data` have shorter contexts.
    """
    tables = count(train)
    bits = {}
    chance = np.full(len(places), 1 / 256)
    for order, table in enumerate(tables):
        chance = _refine(table, order, data, places, chance)
        bits[order] = float(-np.log2(chance).mean())
    return {f"order-{ORDER} n-gram": bits[ORDER], "unigram": bits[0]}


class Table(NamedTuple):
    """How often each string of order + 1 bytes stands in a text.

    Fields:
        codes: the strings as numbers, sorted.
        counts: of each.
        after: by context, how often it stands before any byte.
        kinds: by context, how many different bytes follow it.
    """

    codes: np.ndarray
    counts: np.ndarray
    after: np.ndarray
    kinds: np.ndarray


_counted: dict[str, list[Table]] = {}  # of the last text: counting takes longer than all else


def count(train: Corpus) -> list[Table]:
    """The tables of orders 0 to `ORDER`; those of the last text are kept."""
    if train.digest not in _counted:
        _counted.clear()
        _counted[train.digest] = [_table(train.data, order) for order in range(ORDER + 1)]
    return _counted[train.digest]


def _table(data: np.ndarray, order: int) -> Table:
    codes, counts = np.unique(_codes(data, order), return_counts=True)
    contexts = codes >> 8
    after = np.bincount(contexts, counts, 256**order).astype(np.int32)
    return Table(codes, counts, after, np.bincount(contexts, minlength=256**order).astype(np.int32))


def _refine(table: Table, order: int, data: np.ndarray, places: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The chance of each byte given `order` bytes before it, from that given one less."""
    enough = places >= order
    asked = _codes(data, order)[places[enough] - order]
    at = np.searchsorted(table.codes, asked).clip(max=max(0, len(table.codes) - 1))
    seen = np.where(table.codes[at] == asked, table.counts[at], 0) if len(table.codes) else np.zeros(len(asked))
    after, kinds = table.after[asked >> 8], table.kinds[asked >> 8]
    finer = chance.copy()
    coarse = chance[enough]
    finer[enough] = np.where(after > 0, (seen + kinds * coarse) / np.maximum(after + kinds, 1), coarse)
    return finer


def _codes(data: np.ndarray, order: int) -> np.ndarray:
    """Each string of order + 1 bytes as a number, the first byte the highest."""
    count = max(0, len(data) - order)  # four bytes are the most that a uint32 holds
    code = np.zeros(count, np.uint32)
    for byte in range(order + 1):
        code = (code << 8) | data[byte : byte + count]
    return code
