"""The blocks kernel: a few rows of query blocks a step, each with key blocks of its own, gathered for each head.

For patterns that are made of whole blocks (BigBird). Per step it gathers the linked key blocks of a few query
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
from attention_zoo.ops.dispatch import Kernel, triton_reason
from attention_zoo.ops.parts import Bias, Part, blocks_in, packed
from attention_zoo.ops.pattern_call import Pattern, PatternCall
from attention_zoo.ops.plans import gather_columns, no_bias, run_local, with_global_rows
from attention_zoo.ops.tiles import Tile, scores_at_once

GATHERED = 1 << 21
"""Most elements of keys that a step gathers for one sequence: bounds its memory for wide models."""


class BlockPattern(Pattern, Protocol):
    """A pattern whose rows of query blocks see whole key blocks."""

    block: int

    @property
    def linked(self) -> int:
        """How many key blocks `links` lists for a row, global ones not among them."""
        ...

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
    if not call.starts_at_zero and _Moved(call).wasteful:
        return "most columns of most blocks would be empty (documents or queries much shorter than a block, or holes)"
    return None


def _run(call: PatternCall) -> Tensor:
    call, layout, links, weight = _laid_out(call)
    biases = _Biases(call, layout.keys, layout.block)
    call = layout.move_queries(call)
    # a few queries against a long cache: take the columns that they need, and leave the others where they are
    few = links[0].numel() * layout.block < call.k.shape[1] * call.k.shape[2]
    call = replace(call, k=packed(call.k), v=packed(call.v)) if few else layout.move_keys(call)
    steps = _steps(call, biases, layout.first, links, weight, layout.source if few else None)
    return layout.back(run_local(call, steps, layout.asked, None if few else layout.first))


def _laid_out(call: PatternCall) -> tuple[PatternCall, _Aligned | _Moved, Tensor, Tensor]:
    """The call with its rows that see all marked, where its blocks lie, and their links with weights."""
    pattern = cast(BlockPattern, call.pattern)
    everything = pattern.sees_all(call.queries)
    if everything is not None:
        # such rows are run like those of global tokens; as keys they stay what they are
        queries = call.queries
        call = replace(call, queries=queries._replace(is_global=queries.is_global | (everything & queries.valid)))
    layout = _Aligned(call) if call.starts_at_zero else _Moved(call)
    return call, layout, *layout.links(pattern)


BLOCKS = Kernel("blocks", _run, _refuse, "key blocks gathered for a few query blocks a step; backward recomputes")


def _run_triton(call: PatternCall) -> Tensor:
    from attention_zoo.ops.triton_blocks import Lists, block_attention

    call, layout, links, weight = _laid_out(call)
    call = layout.move_keys(layout.move_queries(call))
    B, _, L, _ = call.q.shape
    block = layout.block
    usable = call.keys.valid & ~call.keys.is_global
    k, v, time = call.k, call.v, torch.arange(call.k.shape[2], device=call.k.device).expand(B, -1)
    label = torch.where(usable, call.keys.document, -1)
    links = torch.where(weight == -torch.inf, -1, links)
    if call.any_global_key:
        # copied behind the others into blocks that all are linked to: there each counts once
        columns, chosen = gather_columns(call.keys, call.keys.is_global & call.keys.valid)
        fill = -columns.shape[1] % block
        columns = F.pad(columns, (0, fill))
        k, v = (torch.cat([x, _take(x, columns)], 2) for x in (k, v))
        time = torch.cat([time, columns], 1)
        label = torch.cat([label, F.pad(torch.where(chosen.valid, chosen.document, -1), (0, fill), value=-1)], 1)
        extra = torch.arange(call.k.shape[2] // block, k.shape[2] // block, device=k.device)
        links = torch.cat([links, extra.expand(*links.shape[:3], -1)], 3)
        weight = F.pad(weight, (0, len(extra)))
    links, count, added = Lists.packed(links.expand(B, -1, -1, -1), weight.expand(B, -1, -1, -1))
    before = layout.first % block
    around = (before, links.shape[2] * block - before - L)
    asked = torch.where(call.queries.valid, call.queries.document, -2)
    lists = Lists(
        links,
        count,
        q_time=F.pad(time[:, layout.first : layout.first + L], around).int(),
        q_label=F.pad(asked, around, value=-2).int(),
        k_time=time.int(),
        k_label=label.int(),
        block=block,
        causal=call.pattern.causal,
        strict=False,
        weight=added,
        first_slot=before,
    )
    out = block_attention(call.q, k, v, lists, scale=call.scale)
    return layout.back(with_global_rows(call, out))


def _refuse_triton(call: PatternCall) -> str | None:
    if reason := triton_reason(call.q.device):
        return reason
    from attention_zoo.ops.triton_blocks import refuse

    if reason := refuse(cast(BlockPattern, call.pattern).block, call.q.shape[3], call.q.dtype):
        return reason
    if call.has_position_bias:
        return "the position scheme adds to the scores"
    return _refuse(call)


TRITON_BLOCKS = Kernel(
    "triton", _run_triton, _refuse_triton, "one Triton kernel walks the list of key blocks of each query block"
)


class _Aligned:
    """The columns of a call whose columns are positions, filled up to whole blocks.

    Fields:
        keys: tokens of the columns.
        source: [1, columns], which of the call's columns each is; any one where it is none.
        first: the column of the first query.
        asked: see `PatternCall`.
    """

    def __init__(self, call: PatternCall):
        self.block, self.asked = cast(BlockPattern, call.pattern).block, call.asked
        S, self.count = call.k.shape[2], call.q.shape[2]
        self.first = S - self.count
        self.more = -S % self.block
        self.keys = Tokens(*(F.pad(field, (0, self.more)) for field in call.keys))  # valid=False
        self.source = torch.arange(S + self.more, device=call.k.device).clamp(max=S - 1)[None]

    def links(self, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
        """Links of the query blocks, and their weights."""
        blocks = torch.where(self.keys.valid, pattern.blocks_of(self.keys), 0).amax(1, keepdim=True)
        same = bool((blocks == blocks[0]).all())
        rows = (self.first // self.block, (self.first + self.count - 1) // self.block + 1)
        return pattern.links(torch.arange(*rows, device=blocks.device)[None], blocks[:1] if same else blocks)

    def move_queries(self, call: PatternCall) -> PatternCall:
        return call

    def move_keys(self, call: PatternCall) -> PatternCall:
        """Contiguous and whole blocks: then a link is one contiguous run."""
        if not self.more:
            return replace(call, k=packed(call.k), v=packed(call.v))
        k, v = (packed(F.pad(x, (0, 0, 0, self.more))) for x in (call.k, call.v))
        return replace(call, k=k, v=v, keys=self.keys)

    def back(self, out: Tensor) -> Tensor:
        return out


class _Moved:
    """New columns for the tokens of any call: whole blocks, each of one document. Rows end at the same block.

    Fields:
        columns: how many there are.
        keys: tokens of the columns.
        source: [B, columns], which of the call's columns each is; any one where it is none.
        first: the first column of the first block that holds a query.
        asked: which columns from there on hold queries, as `PatternCall.asked`.
    """

    def __init__(self, call: PatternCall):
        self.block = block = cast(BlockPattern, call.pattern).block
        self.queries, keys = call.queries, call.keys
        B, S = keys.valid.shape
        self.given = S
        row = keys.position // block
        column = torch.arange(S, device=row.device).expand(B, S)
        before = F.pad(torch.where(keys.valid, column, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
        at = before.clamp(min=0)
        follows = (before >= 0) & (keys.document.gather(1, at) == keys.document)
        index = (torch.where(follows, row - row.gather(1, at), 1) * keys.valid).cumsum(1) - 1
        # rows end together: then the queries of a decoding step share one block, however long their prefixes are
        index = index + (index.amax() - index.amax(1, keepdim=True))
        self.columns = (max(0, int(index.amax())) + 1) * block
        place = torch.where(keys.valid, index * block + keys.position % block, self.columns)
        self.place = place[:, -self.queries.valid.shape[1] :]
        self.first = min(int(self.place.amin()), self.columns - 1) // block * block
        if not self.wasteful:
            source = column.new_full((B, self.columns + 1), S).scatter(1, place, column)[:, :-1]
            self.held, self.source = source < S, source.clamp(max=S - 1)
            self.keys = _only(keys.take(self.source), self.held)

    @property
    def wasteful(self) -> bool:
        """Whether most columns would be empty."""
        L = self.place.shape[1]
        return self.columns > 2 * (self.given + self.block) or self.columns - self.first > 2 * (L + self.block)

    def links(self, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
        """Links of the query blocks, and their weights."""
        keys = self.keys

        def of_block(field: Tensor) -> Tensor:
            return torch.where(keys.valid, field, -1).unflatten(1, (-1, self.block)).amax(-1)

        row, document = of_block(keys.position // self.block), of_block(keys.document)
        mine = slice(self.first // self.block, None)
        links, weight = pattern.links(row[:, mine], of_block(pattern.blocks_of(keys))[:, mine])
        # from counting within the document to counting columns; blocks that are not held are not there
        index = torch.arange(row.shape[1], device=row.device)
        at = (links + (index - row)[:, None, mine, None]).clamp(0, row.shape[1] - 1)
        batch = torch.arange(len(row), device=row.device)[:, None, None, None]
        found = (row[batch, at] == links) & (document[batch, at] == document[:, None, mine, None])
        return at, weight.masked_fill(~found, -torch.inf)

    def move_queries(self, call: PatternCall) -> PatternCall:
        query = self.source[:, self.first :] - (call.k.shape[2] - call.q.shape[2])
        asks, query = self.held[:, self.first :] & (query >= 0), query.clamp(min=0)
        self.asked = asks[:, None, :, None]
        return replace(call, q=_take(call.q, query), queries=_only(call.queries.take(query), asks))

    def move_keys(self, call: PatternCall) -> PatternCall:
        return replace(call, k=_take(call.k, self.source), v=_take(call.v, self.source), keys=self.keys)

    def back(self, out: Tensor) -> Tensor:
        """Outputs at the queries' own columns; zeros at padding."""
        columns = (self.place.clamp(max=self.columns - 1) - self.first).clamp(min=0)
        return _take(out, columns).masked_fill(~self.queries.valid[:, None, :, None], 0)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Each batch row's own columns of [B, H, S, D]."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _only(tokens: Tokens, mask: Tensor) -> Tokens:
    return tokens._replace(valid=tokens.valid & mask, is_global=tokens.is_global & mask)


def _steps(
    call: PatternCall, biases: _Biases, first: int, links: Tensor, weight: Tensor, source: Tensor | None
) -> list[Tile]:
    """Local tiles.

    Args:
        first: column of the first query; `links` and `weight` begin with its block.
        source: the call's columns that make up the blocks; None: k and v are laid out in blocks.
    """
    block, end = biases.block, first + call.q.shape[2]
    weight = weight.to(torch.promote_types(call.q.dtype, torch.float32))
    plain = biases.plain(links, weight)
    heads, rows = _step_size(call, links.shape[3], block)
    if source is None:
        taken, size = blocks_in(call.k, call.q.shape[1], links, block), block
    else:
        taken, size = blocks_in(call.k, call.q.shape[1], _columns(links, source, block), 1), 1
    tiles = []
    for head in range(0, call.q.shape[1], heads):
        mine, start = slice(head, head + heads), first
        while start < end:
            # a first or last row of queries that is cut short is a step of its own
            whole = 0 if start % block else min(rows, (end - start) // block)
            stop = start + whole * block if whole else min(end, start - start % block + block)
            some = slice(start // block - first // block, (stop - 1) // block + 1 - first // block)
            bias: Bias = no_bias
            if not all(plain[some]):
                bias = partial(biases.step, links[:, mine, some], weight[:, mine, some], mine, start, stop)
            part = Part(taken[:, mine, some], bias, size)
            tiles.append(Tile(slice(start - first, stop - first), [part], mine))
            start = stop
    return tiles


def _step_size(call: PatternCall, links: int, block: int) -> tuple[int, int]:
    """Heads and rows of query blocks of a step."""
    (_, H, L, D), group = call.q.shape, call.q.shape[1] // call.k.shape[1]
    most = min(scores_at_once(call.q) // (links * block * block), GATHERED // (links * block * D))
    # few heads and many rows keep the keys near the cache; but a mask of global keys is made once for all heads
    masked = call.any_global_key and (call.pattern.causal or not call.one_document or not call.all_valid)
    rows = max(1, min(most // (H if masked else group), -(-L // block)))
    return min(H, max(1, most // (rows * group)) * group), rows


def _columns(links: Tensor, source: Tensor, block: int) -> Tensor:
    """[B|1, H, g, m · block], the columns of linked blocks one by one."""
    B = max(len(links), len(source))
    row = torch.arange(B, device=links.device)[:, None, None, None]
    return source.expand(B, -1).unflatten(1, (-1, block))[row, links].flatten(-2)


def _some(x: Tensor, batch: slice) -> Tensor:
    return x[batch] if len(x) > 1 else x


class _Biases:
    """Biases of the steps of one call, built when a step runs."""

    def __init__(self, call: PatternCall, keys: Tokens, block: int):
        self.block, self.causal = block, call.pattern.causal
        self.device = call.k.device
        usable = keys.valid & ~keys.is_global
        self.usable = None if bool(usable.all()) else usable.unflatten(1, (-1, block))
        self.by_distance = _by_distance(call, keys.valid.shape[1])

    def plain(self, links: Tensor, weight: Tensor) -> list[bool]:
        """For each row of query blocks, whether it sees all it is linked to, unweighted: then it has no bias."""
        if self.causal or self.by_distance is not None:
            return [False] * links.shape[2]
        seen = weight == 0
        if self.usable is not None:
            row = torch.arange(len(self.usable), device=self.device)[:, None, None, None]
            seen = seen & self.usable.all(-1)[row, links]
        return seen.all(-1).all(0).all(0).tolist()

    def step(self, links: Tensor, weight: Tensor, heads: slice, start: int, stop: int, batch: slice) -> Tensor:
        """[b|1, h, g, n|1, m · block] for the queries at start .. stop, g groups of n, linked to [B|1, h, g, m]."""
        links, weight = _some(links, batch), _some(weight, batch)
        groups, block = links.shape[2], self.block
        bias = weight[..., None].expand(*weight.shape, block)
        if self.usable is not None:
            usable = _some(self.usable, batch)
            row = torch.arange(len(usable), device=self.device)[:, None, None, None]
            bias = bias.masked_fill(~usable[row, links], -torch.inf)
        bias = bias.flatten(-2)[..., None, :]
        column = torch.arange(block, device=self.device)
        query = torch.arange(start, stop, device=self.device).view(groups, -1, 1)
        if self.causal:
            future = F.pad(column > query[0] % block, (bias.shape[-1] - block, 0))  # the own block stands last
            bias = bias.masked_fill(future, -torch.inf)
        if self.by_distance is not None:
            key = (links[..., None] * block + column).flatten(-2)[..., None, :]
            head = torch.arange(links.shape[1], device=self.device)[:, None, None, None]
            by_distance = self.by_distance[heads]
            bias = bias + by_distance[head, key - query + by_distance.shape[1] // 2]
        return bias


def _by_distance(call: PatternCall, length: int) -> Tensor | None:
    """Position bias of a key d columns after the query, [H, 2 · length] at d + length, whatever the query.

    Schemes depend on the difference of positions alone.
    """
    token = Tokens.all_valid(1, 1, call.k.device)
    keys = Tokens.all_valid(1, 2 * length, call.k.device)
    bias = call.pattern.position_bias(token._replace(position=token.position + length), keys)
    return None if bias is None else bias[0, :, 0]
