"""The blocks kernel: a few rows of query blocks a step, each with key blocks of its own, gathered for each head.

For patterns that are made of whole blocks (BigBird). Per step it gathers the linked key blocks of up to `ROWS` query
blocks as long contiguous runs, folds rows into heads and runs them as one part; global tokens are merged in as in every
pattern (ops/plans.py), and backward gathers again. O(L·m) time for m links, O(L) memory: of the pattern nothing but its
list of links is kept, one number per head, row and link.

Where columns are no positions (padding on the left, holes, documents in one row), tokens are first moved so that every
document begins at the border of a block, and moved back afterwards.
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

    def blocks_of(self, tokens: Tokens) -> Int[Tensor, "B L"]:
        """How many blocks each token's document has; 0 where the pattern is causal, which must not know."""
        ...

    def links(
        self, row: Int[Tensor, "#B R"], blocks: Int[Tensor, "#B #R"]
    ) -> tuple[Int[Tensor, "#B H R m"], Float[Tensor, "#B H R m"]]:
        """Different key blocks of each row of query blocks, and what is added to their scores (-inf: unseen).

        Blocks are counted within the document. A causal pattern puts the own block last and no later one before it.
        """
        ...

    def sees_all(self, queries: Tokens) -> Bool[Tensor, "B L"] | None:
        """Queries that see everything without being seen by everything; None: never."""
        ...


def _refuse(call: PatternCall) -> str | None:
    if not call.own_keys:
        return "queries are not the last tokens of the keys"
    if not call.starts_at_zero and _Layout(call).wasteful:
        return "most columns of most blocks would be empty (documents or queries much shorter than a block, or holes)"
    return None


def _run(call: PatternCall) -> Tensor:
    everything = cast(BlockPattern, call.pattern).sees_all(call.queries)
    if everything is not None:
        # such rows are run like those of global tokens; as keys they stay what they are
        queries = call.queries
        call = replace(call, queries=queries._replace(is_global=queries.is_global | (everything & queries.valid)))
    if call.starts_at_zero:
        first = call.k.shape[2] - call.q.shape[2]
        whole = _whole_blocks(call)
        return run_local(whole, _tiles(whole, first, *_aligned_links(whole, first)))
    layout = _Layout(call)
    moved = layout.move(call)
    return layout.back(run_local(moved, _tiles(moved, layout.first, *layout.links(moved))))


BLOCKS = Kernel("blocks", _run, _refuse, "key blocks gathered for a few query blocks a step; backward recomputes")


def _whole_blocks(call: PatternCall) -> PatternCall:
    """Keys and values contiguous and filled up to whole blocks, so that a link is one contiguous run."""
    more = -call.k.shape[2] % cast(BlockPattern, call.pattern).block
    if not more:
        return replace(call, k=call.k.contiguous(), v=call.v.contiguous())
    keys = Tokens(*(F.pad(field, (0, more)) for field in call.keys))  # valid=False
    return replace(call, k=F.pad(call.k, (0, 0, 0, more)), v=F.pad(call.v, (0, 0, 0, more)), keys=keys)


def _aligned_links(call: PatternCall, first: int) -> tuple[Tensor, Tensor]:
    """Links of the query blocks where columns are positions."""
    pattern = cast(BlockPattern, call.pattern)
    blocks = torch.where(call.keys.valid, pattern.blocks_of(call.keys), 0).amax(1, keepdim=True)
    same = bool((blocks == blocks[0]).all())
    row = torch.arange(first // pattern.block, (first + call.q.shape[2] - 1) // pattern.block + 1, device=call.k.device)
    return pattern.links(row[None], blocks[:1] if same else blocks)


class _Layout:
    """New columns for the tokens of a call: whole blocks, each of one document. Rows end at the same block.

    Fields:
        columns: how many there are.
        first: the first column of the first block that holds a query.
    """

    def __init__(self, call: PatternCall):
        self.block = block = cast(BlockPattern, call.pattern).block
        keys, L = call.keys, call.q.shape[2]
        self.queries = call.queries
        row = keys.position // block
        column = torch.arange(keys.valid.shape[1], device=row.device).expand_as(row)
        before = F.pad(torch.where(keys.valid, column, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
        at = before.clamp(min=0)
        follows = (before >= 0) & (keys.document.gather(1, at) == keys.document)
        step = torch.where(follows, row - row.gather(1, at), 1) * keys.valid
        index = step.cumsum(1) - 1
        # rows end together: then the queries of a decoding step share one block, however long their prefixes are
        index = index + (index.amax() - index.amax(1, keepdim=True))
        self.columns = (max(0, int(index.amax())) + 1) * block
        self.place = torch.where(keys.valid, index * block + keys.position % block, self.columns)
        mine = self.place[:, -L:]
        self.first = min(int(mine.amin()), self.columns - 1) // block * block

    @property
    def wasteful(self) -> bool:
        queries = self.queries.valid.shape[1]
        return (
            self.columns > 2 * (self.place.shape[1] + self.block)
            or self.columns - self.first > 2 * (queries + self.block)
        )  # fmt: skip

    def move(self, call: PatternCall) -> PatternCall:
        """The call in the new columns."""
        (B, S), L = self.place.shape, call.q.shape[2]
        column = torch.arange(S, device=self.place.device).expand(B, S)
        source = column.new_full((B, self.columns + 1), S).scatter(1, self.place, column)[:, :-1]
        held, source = source < S, source.clamp(max=S - 1)
        query = source[:, self.first :] - (S - L)
        asks, query = held[:, self.first :] & (query >= 0), query.clamp(min=0)
        return replace(
            call,
            q=_take(call.q, query),
            k=_take(call.k, source),
            v=_take(call.v, source),
            queries=_only(call.queries.take(query), asks),
            keys=_only(call.keys.take(source), held),
        )

    def back(self, out: Tensor) -> Tensor:
        """Outputs of the moved call at the queries' own columns; zeros at padding."""
        place = self.place[:, -self.queries.valid.shape[1] :].clamp(max=self.columns - 1) - self.first
        return _take(out, place.clamp(min=0)).masked_fill(~self.queries.valid[:, None, :, None], 0)

    def links(self, call: PatternCall) -> tuple[Tensor, Tensor]:
        """Links of the query blocks of the moved call."""
        pattern, keys = cast(BlockPattern, call.pattern), call.keys

        def of_block(field: Tensor) -> Tensor:
            return torch.where(keys.valid, field, -1).unflatten(1, (-1, self.block)).amax(-1)

        row, document, blocks = (
            of_block(x) for x in (keys.position // self.block, keys.document, pattern.blocks_of(keys))
        )
        mine = slice(self.first // self.block, None)
        links, weight = pattern.links(row[:, mine], blocks[:, mine])
        index = torch.arange(row.shape[1], device=row.device)
        at = links + (index - row)[:, None, mine, None]
        inside = (at >= 0) & (at < row.shape[1])
        at = at.clamp(0, row.shape[1] - 1)
        batch = torch.arange(len(row), device=row.device)[:, None, None, None]
        found = inside & (row[batch, at] == links) & (document[batch, at] == document[:, None, mine, None])
        return at, weight.masked_fill(~found, -torch.inf)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Each batch row's own columns of [B, H, S, D]."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _only(tokens: Tokens, mask: Tensor) -> Tokens:
    return tokens._replace(valid=tokens.valid & mask, is_global=tokens.is_global & mask)


def _tiles(call: PatternCall, first: int, links: Tensor, weight: Tensor) -> list[Tile]:
    """Local tiles; the first query stands at column `first`, and links and weight are those of its block and after."""
    (B, _, L, D), block = call.q.shape, cast(BlockPattern, call.pattern).block
    end = first + L
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
