"""Random sequences on several processes: mechanisms, options, lengths, padding, documents, global tokens and shards."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sequence_cases import Case, differs

from attention_zoo import Tokens
from attention_zoo.layout.placement import contiguous

LENGTHS = (1, 2, 3, 5, 7, 8, 12, 16, 17, 23, 31, 32, 33, 48, 61, 67)
GLOBAL = ("longformer", "bigbird", "full")
ONE_RUN = ("transformer_xl", "compressive", "block_recurrent", "memory_tokens")
"""Those whose processes must own a run of columns each, in order; all are causal."""
POSITIONS = ("none", "rotary", "alibi")

OPTIONS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "longformer": lambda r: {
        "window": r.choice((1, 2, 5, 13, 40)), **r.choice(({"sinks": 2}, {"dilation": 2}, {})),
        "sink_logit": r.random() < 0.3, "positions": r.choice(POSITIONS),
    },
    "bigbird": lambda r: {
        "block": r.choice((1, 2, 4)), "random": r.choice((0, 1, 3)), "extra_global_tokens": r.choice((0, 0, 2)),
        "positions": r.choice(POSITIONS),
    },
    "full": lambda r: {"sink_logit": r.random() < 0.3, "positions": r.choice(POSITIONS)},
    "adaptive_span": lambda r: {
        **r.choice(({"limit": 1}, {"limit": 4, "start": 2.5}, {"limit": 11, "start": 9.0}, {"limit": 30})),
        "ramp": r.choice((1, 2, 7)),
    },
    "memory_compressed": lambda r: {"compression": r.choice((1, 2, 3, 5))},
    "h_transformer_1d": lambda r: {"block": r.choice((2, 4, 6))},
    "transformer_xl": lambda r: {
        "segment_length": r.choice((1, 3, 4, 8, 64)), "memory_length": r.choice((0, 1, 3, 8, 20)),
        "same_length": r.random() < 0.3, "clamp_length": r.choice((None, 2, 5)),
    },
    "compressive": lambda r: {
        "segment_length": r.choice((2, 4, 6)), "memory_length": r.choice((2, 3, 6)),
        "compressed_length": r.choice((0, 2, 8)), "ratio": r.choice((1, 2, 3)),
        "compression": r.choice(("mean", "max", "conv", "dilated", "most_used")),
    },
    "block_recurrent": lambda r: {
        "window": r.choice((1, 2, 4, 7)), "states": r.choice((1, 3)), "gate": r.choice(("fixed", "lstm")),
        "truncate": r.choice((None, 1, 2)), "positions": r.choice(POSITIONS),
    },
    "memory_tokens": lambda r: {
        "count": r.choice((1, 3)), "segment_length": r.choice((2, 5, 8)), "inner": r.choice(("full", "longformer")),
    },
}  # fmt: skip


def tokens_of(r: random.Random, length: int, marked: bool) -> Tokens:
    """Rows with padding on either side and in holes, in one document or several, maybe one without any token."""
    rows, how = r.choice((1, 2, 3)), r.choice(("none", "left", "right", "holes", "all", "empty"))
    valid = torch.ones(rows, length, dtype=torch.bool)
    for row in valid:
        if how in ("left", "all"):
            row[: r.randrange(length)] = False
        if how in ("right", "all"):
            row[length - r.randrange(length) :] = False
        if how in ("holes", "all"):
            row[[r.random() < 0.25 for _ in range(length)]] = False
    if how == "empty":
        valid[r.randrange(rows)] = False

    def drawn(chance: float) -> torch.Tensor:
        return torch.tensor([[r.random() < chance for _ in range(length)] for _ in range(rows)])

    document = drawn(r.choice((0.05, 0.2, 0.6))).long().cumsum(1) if r.random() < 0.4 else None
    return Tokens.of(valid, drawn(r.choice((0.05, 0.4))) if marked else None, document)


def columns_of(r: random.Random, length: int, size: int, how: str) -> list[np.ndarray]:
    """Columns of each process."""
    if how == "scattered":
        owner = np.array([r.randrange(size) for _ in range(length)])
        return [np.flatnonzero(owner == rank) for rank in range(size)]
    # who hands a whole state on owns a column at least
    cuts = r.sample(range(1, length), size - 1) if how == "full runs" else r.choices(range(length + 1), k=size - 1)
    return [np.arange(a, b) for a, b in pairwise([0, *sorted(cuts), length])]


def drawn(seed: str, size: int) -> Case:
    """A case that follows from the seed alone."""
    r = random.Random(seed)
    name, heads = r.choice(list(OPTIONS)), r.choice((1, 2, 4))
    options = OPTIONS[name](r)
    if name not in ("transformer_xl", "compressive") and r.random() < 0.3:
        options["kv_heads"] = 1
    if name not in ONE_RUN and "sinks" not in options and r.random() < 0.4:
        options["causal"] = False
    length = r.choice([each for each in LENGTHS if name != "memory_tokens" or each >= size])
    tokens = tokens_of(r, length, name in GLOBAL and r.random() < 0.3)
    how = r.choice(("even", "runs", "runs", "scattered"))
    if name in ONE_RUN and how == "scattered":
        how = "runs"
    if name == "memory_tokens" and how == "runs":
        how = "full runs"
    columns = contiguous(length, size) if how == "even" else columns_of(r, length, size, how)

    def said(_: int) -> Tokens:
        return tokens

    def owned(*_: int) -> Any:
        return columns

    said.__name__, owned.__name__ = seed, f"{how} {[len(each) for each in columns]}"
    return Case(name, length, options, said, owned, width=4 * heads, heads=heads)


def some_are_one(count: int) -> list[str]:
    """What of so many cases differs; the seed says which."""
    size = dist.get_world_size()
    return [line for number in range(count) for line in differs(drawn(f"{size}/{number}", size))]


def a_few_random_ones_are_one() -> list[str]:
    return some_are_one(12)


def many_random_ones_are_one() -> list[str]:
    return some_are_one(150)
