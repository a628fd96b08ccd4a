"""Random links of BigBird: to which key blocks each row of query blocks is linked, for each head.

`Uniform` is the paper: any block beyond window and global blocks, each as likely as another, none twice. It is a
counter-based hash of (seed, head, row, draw), so that a link is the same at every call, on every device and in every
cut, without a table.

`Reference` replays what the released code does, as Hugging Face runs it (numpy's legacy generator, seeded with the
layer's number, which is our `seed`). It differs from the paper:
- In training, rows link within the first 2r + 5 blocks alone, whatever the length (transformers#16566).
- At 1,024, 3,072 and 4,096 tokens an older plan is used, drawn over 4,096 tokens for each head in turn, whose picks lie
  within the first 1,024 tokens and may hit the last block, or in its last two rows the window, again.
- In evaluation all links are to block 0.
- Up to 2r + 5 blocks the model attends to everything.
A block that is picked again counts again in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

OLD_LENGTHS = (1024, 3072, 4096)
OLD_DRAWN, OLD_REACHED = 4096, 1024
"""Tokens over which the old plan is drawn (the released models' longest input), and within which its links lie."""


class LinkPlan(Protocol):
    """Which links a row has."""

    def picks(self, row: Int[Tensor, "*#n"], blocks: Int[Tensor, "*#n"]) -> Int[Tensor, "*n H r"]:
        """Key blocks that each head of these rows is linked to, -1 where there is none (left), in any order.

        Args:
            row: index of the query block. Any integer: rows outside of the document have whatever links.
            blocks: how many blocks the document has; ignored by causal plans.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """The paper's plan.

    Fields:
        side: blocks of the window on each side.
        ends: blocks at each end of the document (causal: at its start) that are global, and so never drawn.
        causal: rows link to earlier blocks alone, and know nothing of the document's length.
    """

    seed: int
    heads: int
    random: int
    side: int
    ends: int
    causal: bool

    def picks(self, row: Tensor, blocks: Tensor) -> Tensor:
        if not self.random:
            return row.new_empty(*torch.broadcast_shapes(row.shape, blocks.shape), self.heads, 0)
        row = row[..., None]
        below = (row - self.side - self.ends).clamp(min=0)
        beyond = row + self.side + 1
        above = torch.zeros_like(below) if self.causal else (blocks[..., None] - self.ends - beyond).clamp(min=0)
        count = below + above
        head = torch.arange(self.heads, device=row.device)
        shape = *torch.broadcast_shapes(count.shape, head.shape), 0
        ranks, sorted_ = count.new_empty(shape), count.new_empty(shape)
        # a short text has fewer blocks than may be drawn; an accelerator is not asked how many
        draws = min(self.random, int(count.max())) if count.is_cpu and count.numel() else self.random
        for draw in range(draws):
            # a rank among what earlier draws left; stepping over theirs makes it one among all. The i-th of them, in
            # order, is stepped over by a rank of at least its own less i: these bounds grow, so one look compares all
            left, at = count - draw, torch.arange(draw + 1, device=row.device)
            rank = (_draw(self.seed, head, row, draw) % left.clamp(min=1))[..., None]
            steps = (sorted_ - at[:-1] <= rank).sum(-1, keepdim=True)
            rank = rank + steps
            ranks = torch.cat([ranks, torch.where(left[..., None] > 0, rank, count[..., None])], -1)
            sorted_ = torch.where(at < steps, pad(sorted_, (0, 1)), pad(sorted_, (1, 0))).where(at != steps, rank)
        ranks = torch.cat([ranks, count[..., None].expand(*shape[:-1], self.random - draws)], -1)
        rank, below, beyond, count = ranks, below[..., None], beyond[..., None], count[..., None]
        block = torch.where(rank < below, self.ends + rank, beyond + rank - below)
        return torch.where(rank < count, block, -1)


def _draw(*keys: int | Tensor) -> Tensor:
    """31 random bits, a function of the keys alone: splitmix64 (Steele et al. 2014) absorbing one key after another."""
    state = torch.zeros((), dtype=torch.long)
    for key in keys:
        word = key if isinstance(key, Tensor) else (key + 2**63) % 2**64 - 2**63
        state = _mix(state + word - 0x61C8864680B583EB)
    return _shifted(state, 33)


def _mix(x: Tensor) -> Tensor:
    # int64 arithmetic wraps, so these are the generator's unsigned constants written as signed ones
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Reference:
    """The released plan.

    Fields:
        block: tokens of a block: the old plan counts in tokens.
        training: links as drawn in training, or all to block 0 as in evaluation.
    """

    seed: int
    heads: int
    random: int
    block: int
    training: bool

    @property
    def full_blocks(self) -> int:
        """Up to so many blocks the released model attends to everything."""
        return 2 * self.random + 5

    def picks(self, row: Tensor, blocks: Tensor) -> Tensor:
        row, blocks = torch.broadcast_tensors(row, blocks)
        found = row.new_full((*row.shape, self.heads, self.random), -1)
        for count in blocks.unique().tolist():
            if count > self.full_blocks:
                table = self._table(count).to(row.device)
                here = (blocks == count) & (row >= 0) & (row < count)
                found = torch.where(here[..., None, None], table[row.clamp(0, count - 1)], found)
        return found

    def _table(self, count: int) -> Tensor:
        if self.training:
            return _released(self.seed, self.heads, self.random, self.block, count)
        table = torch.zeros(count, self.heads, self.random, dtype=torch.long)
        table[0] = table[-1] = -1
        return table


@lru_cache(maxsize=64)
def _released(seed: int, heads: int, random: int, block: int, count: int) -> Int[Tensor, "n H r"]:
    """Links of every row in training; -1 in the first and the last, which are global."""
    rng = np.random.RandomState(seed)
    table = np.full((count, heads, random), -1)
    if count * block in OLD_LENGTHS:
        drawn = OLD_DRAWN // block
        last = OLD_REACHED // block - 1 if 2 * block < OLD_REACHED else drawn - 1
        # every draw moves the generator on, so also those of rows that this document does not have
        for head in range(heads):
            for row in range(1, drawn - 1):
                allowed = np.arange(1, min(last, drawn - 2) + 1)
                if row < drawn - 3:
                    allowed = allowed[(allowed < row - 1) | (allowed > row + 1)]
                picked = rng.permutation(allowed)[:random]
                if row < count - 1:
                    table[row, head, : len(picked)] = picked
    else:
        reached = 2 * random + 5
        for row in range(1, count - 1):
            taken = {0, reached - 1, row - 1, row, row + 1}
            taken |= {reached - 2} if row == 1 else {1} if row == reached - 2 else set()
            for head in range(heads):
                legal = [pick for pick in rng.permutation(reached).tolist() if pick not in taken]
                table[row, head] = legal[:random]
    return torch.from_numpy(table).long()
