"""The bar for a model of bytes: n-grams of the same training bytes, counted and smoothed (Witten and Bell 1991).

    p(x | c) = (n(c x) + D(c) p(x | c')) / (n(c) + D(c))

n counts, D(c) is the number of different bytes seen after c, c' is c without its farthest byte; below the empty context
every byte has 1/256. An order-3 n-gram has contexts of three bytes. Counting 8 MB takes about a second.

For masked bytes there are two of them, one reads backwards: with l before and r after x, taken as independent given x,
p(x | l, r) ~ p(x | l) p(x | r) / p(x).

A model that does not beat it has not been trained enough to say anything of attention.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attention_zoo.tasks.corpus import Corpus

ORDER = 3
BYTES = np.arange(256, dtype=np.uint32)
NAME = f"order-{ORDER} n-gram"


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


_counted: dict[tuple[str, bool], list[Table]] = {}  # of the last text: counting takes longer than all else


def count(train: Corpus, backwards: bool = False) -> list[Table]:
    """The tables of orders 0 to `ORDER`; those of the last text are kept."""
    if any(digest != train.digest for digest, _ in _counted):
        _counted.clear()
    key = (train.digest, backwards)
    if key not in _counted:
        data = train.data[::-1] if backwards else train.data
        _counted[key] = [_table(data, order) for order in range(ORDER + 1)]
    return _counted[key]


def _table(data: np.ndarray, order: int) -> Table:
    codes, counts = np.unique(_codes(data, order), return_counts=True)
    contexts = codes >> 8
    after = np.bincount(contexts, counts, 256**order).astype(np.int32)
    return Table(codes, counts, after, np.bincount(contexts, minlength=256**order).astype(np.int32))


def _codes(data: np.ndarray, order: int) -> np.ndarray:
    """Each string of order + 1 bytes as a number, the first byte the highest; four bytes fill it."""
    count = max(0, len(data) - order)
    code = np.zeros(count, np.uint32)
    for byte in range(order + 1):
        code = (code << 8) | data[byte : byte + count]
    return code


def chances(tables: list[Table], near: np.ndarray, known: np.ndarray, said: np.ndarray) -> np.ndarray:
    """The chance of bytes by the highest order of which the context is known.

    Args:
        tables: of `count`.
        near: [..., ORDER], the bytes that are read, the nearest first.
        known: [...], how many of those there are before one is missing.
        said: the bytes, of a shape that goes with [...].
    """
    found = np.full(np.broadcast_shapes(known.shape, said.shape), 1 / 256)
    context = np.zeros(known.shape, np.uint32)
    for order, (codes, counts, after, kinds) in enumerate(tables):
        if order:
            context = np.where(known >= order, context | near[..., order - 1].astype(np.uint32) << 8 * (order - 1), 0)
        asked = (context << 8) | said.astype(np.uint32)
        at = np.searchsorted(codes, asked).clip(max=len(codes) - 1)
        seen = np.where(codes[at] == asked, counts[at], 0)
        often, kind = after[context], kinds[context]
        finer = (seen + kind * found) / np.maximum(often + kind, 1)
        found = np.where((known >= order) & (often > 0), finer, found)
    return found


def bits_per_byte(train: Corpus, data: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Mean bits of the bytes at `places` in `data`, given the three before each, by the name of the rule.

    Args:
        train: counted.
        places: indices; the first bytes of `data` have shorter contexts.
    """
    near = data[(places[:, None] - 1 - np.arange(ORDER)).clip(min=0)]
    known = places.clip(max=ORDER)
    return {
        NAME: _bits(chances(count(train), near, known, data[places])),
        "unigram": _bits(chances(count(train), near, known * 0, data[places])),
    }


def _bits(chance: np.ndarray) -> float:
    return float(-np.log2(chance).mean())


def two_sided(train: Corpus, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n, 256], the chance of each byte at some places, given the three before and after that are bytes.

    Args:
        ids: [B, L]; what is no byte, 256 and more, ends a context.
        rows, columns: [n], the places.
    """
    sides = []
    for backwards in (False, True):
        step = 1 if backwards else -1
        at = columns[:, None] + step * (1 + np.arange(ORDER))
        inside = (at >= 0) & (at < ids.shape[1])
        near = np.where(inside, ids[rows[:, None], at.clip(0, ids.shape[1] - 1)], 256)
        known = np.cumprod(near < 256, axis=1).sum(1)
        sides.append(chances(count(train, backwards), near[:, None] & 255, known[:, None], BYTES))
    nothing = np.zeros(1, np.int64)
    alone = chances(count(train), np.zeros((1, ORDER), np.int64), nothing, BYTES)
    both = sides[0] * sides[1] / alone
    return both / both.sum(1, keepdims=True)
