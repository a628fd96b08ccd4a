"""The blocks kernel: a few rows of query blocks a step, each with key blocks of its own, gathered for each head.

For patterns that are made of whole blocks (BigBird) on columns that are positions. Per step it gathers the linked key
blocks of up to `ROWS` query blocks as long contiguous runs, folds rows into heads and runs them as one part; global
tokens are merged in as for every pattern (ops/plans.py), and backward gathers again. O(L·m) time for m links, O(L)
memory: of the pattern nothing but its list of links is kept, one number per head, row and link.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.contract import Tokens
from attention_zoo.ops.dispatch import Kernel
from attention_zoo.ops.pattern_call import Pattern, PatternCall
from attention_zoo.ops.plans import run_local
from attention_zoo.ops.tiles import Part, Tile

ROWS = 8
"""Most query blocks of a step. More is no faster (KV of a step no longer fits the cache), and costs memory."""
GATHERED = 1 << 21
"""Most elements of keys that a step gathers, over the batch: bounds its memory for wide models and large batches."""


class BlockPattern(Pattern, Protocol):
    """A pattern whose rows of query blocks see whole key blocks."""

    block: int

    def links(self, row: Int[Tensor, " R"], keys: Tokens) -> tuple[Int[Tensor, "#B H R m"], Float[Tensor, "#B H R m"]]:
        """Different key blocks of each row of query blocks, and what is added to their scores (-inf: unseen).

        A causal pattern puts the own block last and no later one before it.
        """
        ...

    def sees_all(self, queries: Tokens) -> Bool[Tensor, "B L"] | None:
        """Queries that see everything without being seen by everything; None: never."""
        ...


def _refuse(call: PatternCall) -> str | None:
    if not call.starts_at_zero:
        return "columns are not positions here (padding on the left, holes, several documents, or a query without key)"
    return None


def _run(call: PatternCall) -> Tensor:
    pattern = cast(BlockPattern, call.pattern)
    everything = pattern.sees_all(call.queries)
    if everything is not None:
        # such rows are run like those of global tokens; as keys they stay what they are
        queries = call.queries
        call = replace(call, queries=queries._replace(is_global=queries.is_global | (everything & queries.valid)))
    first = call.k.shape[2] - call.q.shape[2]
    call = _whole_blocks(call, pattern.block)
    return run_local(call, _tiles(call, pattern, first))


BLOCKS = Kernel("blocks", _run, _refuse, "key blocks gathered for a few query blocks a step; backward recomputes")


def _whole_blocks(call: PatternCall, block: int) -> PatternCall:
    """Keys and values contiguous and filled up to whole blocks, so that a link is one contiguous run."""
    more = -call.k.shape[2] % block
    if not more:
        return replace(call, k=call.k.contiguous(), v=call.v.contiguous())
    keys = Tokens(*(F.pad(field, (0, more)) for field in call.keys))  # valid=False
    return replace(call, k=F.pad(call.k, (0, 0, 0, more)), v=F.pad(call.v, (0, 0, 0, more)), keys=keys)


def _tiles(call: PatternCall, pattern: BlockPattern, first: int) -> list[Tile]:
    """Local tiles; the first query is the token at position `first`."""
    (B, _, L, D), block = call.q.shape, pattern.block
    end = first + L
    row = torch.arange(first // block, (end - 1) // block + 1, device=call.k.device)
    links, weight = pattern.links(row, call.keys)
    weight = weight.to(torch.promote_types(call.q.dtype, torch.float32))
    most = max(1, min(ROWS, GATHERED // (B * links.shape[1] * links.shape[3] * block * D)))
    biases = _Biases(call, block)
    tiles, start = [], first
    while start < end:
        # a first or last row of queries that is cut short is a step of its own
        whole = 0 if start % block else min(most, (end - start) // block)
        stop = start + whole * block if whole else min(end, start - start % block + block)
        rows = slice(start // block - first // block, (stop - 1) // block + 1 - first // block)
        bias = partial(biases.step, links[:, :, rows], weight[:, :, rows], start, stop)
        tiles.append(Tile(slice(start - first, stop - first), [Part(links[:, :, rows], bias, block)]))
        start = stop
    return tiles


class _Biases:
    """Biases of the steps of one call, built when a step runs."""

    def __init__(self, call: PatternCall, block: int):
        self.block, self.causal = block, call.pattern.causal
        self.device = call.k.device
        usable = call.keys.valid & ~call.keys.is_global
        self.usable = None if bool(usable.all()) else usable.unflatten(1, (-1, block))
        self.by_distance = _by_distance(call)

    def step(self, links: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        """[B|1, H, g, n|1, m · block] for the queries at start .. stop, g groups of n, linked to [B|1, H, g, m]."""
        groups, block = links.shape[2], self.block
        bias = weight[..., None].expand(*weight.shape, block)
        if self.usable is not None:
            row = torch.arange(len(self.usable), device=self.device)[:, None, None, None]
            bias = bias.masked_fill(~self.usable[row, links], -torch.inf)
        bias = bias.flatten(-2)[..., None, :]
        column = torch.arange(block, device=self.device)
        query = torch.arange(start, stop, device=self.device).view(groups, -1, 1)
        if self.causal:
            future = F.pad(column > query[0] % block, (bias.shape[-1] - block, 0))  # the own block stands last
            bias = bias.masked_fill(future, -torch.inf)
        if self.by_distance is not None:
            key = (links[..., None] * block + column).flatten(-2)[..., None, :]
            head = torch.arange(links.shape[1], device=self.device)[:, None, None, None]
            bias = bias + self.by_distance[head, key - query + self.by_distance.shape[1] // 2]
        return bias


def _by_distance(call: PatternCall) -> Tensor | None:
    """Position bias of a key at distance d from the query, [H, 2S] at d + S: schemes depend on differences alone."""
    length = call.k.shape[2]
    token = Tokens.all_valid(1, 1, call.k.device)
    keys = Tokens.all_valid(1, 2 * length, call.k.device)
    bias = call.pattern.position_bias(token._replace(position=token.position + length), keys)
    return None if bias is None else bias[0, :, 0]
