"""Where a column lives: one sequence whose columns are owned by several processes, as one fact of a call.

Every process knows the tokens of the whole sequence (a few integers a column) and which columns each process owns; so
each finds, without asking, what all the others need of it. Hidden states, keys and values live with their owners alone.

    placed = Placement.of(tokens, group)                # the same on every process of the group
    out = layer(placed.take(x), placed.own)             # own columns in, own columns out

A shard's `Layout` carries its placement; a mechanism that knows it fetches what its queries need from the owners, and
one that does not refuses. Parameters' gradients and losses are shares: their sum over the group is what one process
has. Every process of the group makes the same calls, and goes back through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.rules import Unsupported, at_least
from attention_zoo.tokens import Tokens


@dataclass
class Traffic:
    """Bytes that this process has sent, by what they were: ("keys", "forward"), ("keys", "backward"), ..."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, direction: str, count: int) -> None:
        """So many bytes more."""
        if count:
            self.sent[kind, direction] += count

    def bytes(self, *names: str) -> int:
        """Of all that has one of these for a kind or a direction; by default of everything."""
        return sum(count for key, count in self.sent.items() if not names or set(key) & set(names))


@dataclass(frozen=True, eq=False)
class Placement:
    """Which process owns which columns of a sequence.

    Fields:
        group: the process group, of `torch.distributed`.
        rank, size: of this process in the group, and how many there are.
        whole: the tokens of the whole sequence, the same on every process.
        columns: for each process the columns that it owns, rising; every column has one owner. A process may own none.
        traffic: what this process has sent in calls under this placement.
    """

    group: Any
    rank: int
    size: int
    whole: Layout
    columns: tuple[Int[np.ndarray, " n"], ...]
    traffic: Traffic = field(default_factory=Traffic)

    @staticmethod
    def of(tokens: Tokens, group: Any = None, columns: Sequence[Array] | None = None) -> Placement:
        """Of a sequence whose tokens are known to all processes of a group.

        Args:
            tokens: of the whole sequence, [B, L]: equal on every process, in the place where the shard shall be.
            group: default all processes.
            columns: of each process; default `contiguous`.

        Raises:
            ValueError: where there is no process group, or the columns do not have one owner each.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "group must be one of torch.distributed, which is not initialized: init_process_group first"
            )
        group = dist.group.WORLD if group is None else group
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), tokens.valid.shape[1]
        if rank < 0:
            raise ValueError("group must be one that this process is in, got another")
        owned = contiguous(length, size) if columns is None else tuple(np.asarray(each, np.int64) for each in columns)
        if len(owned) != size or any(each.ndim != 1 or bool((np.diff(each) <= 0).any()) for each in owned):
            raise ValueError(f"columns must be rising numbers for each of {size} processes, got {columns}")
        if not np.array_equal(np.sort(np.concatenate(owned)), np.arange(length)):
            raise ValueError(f"columns must give each of {length} columns to one process, got {columns}")
        return Placement(group, rank, size, Layout.of(tokens), owned)

    @cached_property
    def own(self) -> Layout:
        """The tokens of this process's columns, with this placement."""
        return self.placed(self.whole)

    def placed(self, whole: Layout) -> Layout:
        """The same of tokens that are those of the whole sequence but for which are global."""
        made = self.chosen(whole, self.columns[self.rank])
        made.__dict__["placement"] = self
        return made

    @staticmethod
    def chosen(whole: Layout, columns: Int[np.ndarray, " n"]) -> Layout:
        """Some columns of the whole sequence, without a placement."""
        return Layout.known(whole.host.take_all(columns), whole.valid.device)

    def take(self, x: Tensor, axis: int = 1) -> Tensor:
        """This process's columns of a tensor of the whole sequence, whose columns are along `axis`."""
        return x.index_select(axis, tensor_of(self.columns[self.rank], x.device))

    @cached_property
    def owner(self) -> Int[np.ndarray, " L"]:
        """The owner of each column."""
        found = np.zeros(sum(map(len, self.columns)), np.int64)
        for rank, columns in enumerate(self.columns):
            found[columns] = rank
        return found


def alone(layout: Layout) -> Layout:
    """A shard's tokens, as if there were no others; one object."""
    return layout.plan("alone", lambda: Layout(*layout)._with(layout.host))


def contiguous(length: int, size: int) -> tuple[Array, ...]:
    """Columns in runs of about the same length, one for each process: what a window wants."""
    at_least(0, length=length)
    at_least(1, size=size)
    borders = [length * rank // size for rank in range(size + 1)]
    return tuple(np.arange(a, b) for a, b in pairwise(borders))


def zigzag(length: int, size: int) -> tuple[Array, ...]:
    """Two runs for each process, of 2 · size the r-th and the r-th from the end: causal work is the same for all.

    For a ring (full attention). A window would send two halos instead of one.
    """
    runs = contiguous(length, 2 * size)
    return tuple(np.concatenate([runs[rank], runs[2 * size - 1 - rank]]) for rank in range(size))


def check_placed(backend: str, travels: str | None, layout: Layout, **beside: Any) -> None:
    """Refuse a shard of a sequence where a mechanism does not know how to fetch what it needs.

    Args:
        travels: what the mechanism sends; None: nothing, it knows its own columns alone.
        beside: what else the call was given that does not go with a shard, by name; None: it was not.
    """
    if layout.placement is None:
        return
    if travels is None:
        raise Unsupported(
            backend, "a sequence on several processes", "it would see its own columns alone",
            "one process for each sequence (data parallel), or full or longformer",
        )  # fmt: skip
    for name, given in beside.items():
        if given is not None:
            raise Unsupported(
                backend, f"{name} with a sequence on several processes", "a shard is one call over the whole sequence",
                f"{name}=None",
            )  # fmt: skip
