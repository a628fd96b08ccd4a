"""The blocks kernel: a few rows of query blocks a step, each with key blocks of its own, gathered for each head.

For patterns that are made of whole blocks (BigBird). Per step it gathers the linked key blocks of a few query blocks as
long contiguous runs, folds rows into heads and runs them as one part; global tokens are merged in as in every pattern
(globals.py), and backward gathers again. O(L·m) time for m links, O(L) memory: of the pattern nothing but its list of
links is kept, one number per head, row and link.

Where columns are no positions (padding on the left, holes, documents in one row), tokens are first moved so that every
document begins at the border of a block, and moved back afterwards (layout/grid.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.grid import Grid, Way, is_wasteful, mask_of
from attention_zoo.layout.host import Array, array_of, tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.band import by_distance
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import no_bias
from attention_zoo.ops.pattern.local import run_local
from attention_zoo.ops.softmax.parts import Bias, Part, blocks_in, packed
from attention_zoo.ops.softmax.tiles import Tile, scores_at_once

GATHERED = 1 << 21
"""Most elements of keys that a step gathers for one sequence: bounds its memory for wide models."""


def fills_blocks(call: PatternCall) -> str | None:
    if not call.own_keys or call.starts_at_zero or not is_wasteful(_grid(call), call.q.shape[2]):
        return None
    return "most columns of most blocks would be empty (documents or queries much shorter than a block, or holes)"


def columns_to_run(call: PatternCall) -> int:
    """How many columns this kernel runs for the call's queries: those and what fills their blocks."""
    grid = _grid(call)
    return grid.columns - grid.first(call.q.shape[2])


def _grid(call: PatternCall) -> Grid:
    return (Grid.filled if call.starts_at_zero else Grid.of)(call.keys, call.blocks.size)


class Links:
    """The key blocks that each row of query blocks of a call is linked to, and where its queries lie.

    Attributes:
        first: the column of the first query, or of the first block that holds one where columns are moved.
        links: [B|1, H, rows, m], blocks of the grid's columns; `weight` is added to their scores (-inf: unseen).
    """

    def __init__(self, call: PatternCall, grid: Grid):
        reach, L = call.blocks, call.q.shape[2]
        if not grid.moved:
            self.first = call.k.shape[2] - L
            keys = grid.keys.host
            blocks = np.where(keys.valid, reach.blocks_of(keys.length), 0).max(1, keepdims=True)
            same = bool((blocks == blocks[0]).all())
            rows = np.arange(self.first // grid.size, (self.first + L - 1) // grid.size + 1)
            listed, added = reach.lists(rows[None], blocks[:1] if same else blocks)
            # a document may be longer than what is held of it, where others hold the rest (layout/placement.py)
            last = grid.columns // grid.size - 1
            self.links, self.weight = listed.clamp(max=last), torch.where(listed > last, -torch.inf, added)
            return
        self.first = grid.first(L)
        mine = slice(self.first // grid.size, None)
        row, document = grid.row, grid.document
        blocks = grid.of_block(reach.blocks_of(grid.keys.host.length))
        links, weight = (array_of(x) for x in reach.lists(row[:, mine], blocks[:, mine]))
        # from counting within the document to counting columns; blocks that are not held are not there
        index = np.arange(row.shape[1])
        at = (links + (index - row)[:, None, mine, None]).clip(0, row.shape[1] - 1)
        batch = np.arange(len(row))[:, None, None, None]
        found = (row[batch, at] == links) & (document[batch, at] == document[:, None, mine, None])
        self.links, self.weight = torch.from_numpy(at), torch.from_numpy(np.where(found, weight, -np.inf))


class Laid:
    """A call in blocks: the queries, and the keys where they are moved."""

    def __init__(self, call: PatternCall):
        self.given, self.grid = call, _grid(call)
        call = with_whole_rows(call)
        self.first = self.grid.first(call.q.shape[2]) if self.grid.moved else call.k.shape[2] - call.q.shape[2]
        self.block = self.grid.size
        self.call, self.asked = call, call.asked
        self.moved = self.grid.moved and not (self.grid.stays and call.q.shape[2] == call.k.shape[2])
        if self.moved:
            queries, self.way, self.asked = call.queries.plan(
                ("moved", id(self.grid)), lambda: self._move_queries(call)
            )
            self.call = replace(call, q=self.way.go(call.q), queries=queries)

    def _move_queries(self, call: PatternCall) -> tuple[Layout, Way, Tensor]:
        """What the columns from the first block on hold: the queries, and where they are taken from."""
        L, device = call.q.shape[2], call.q.device
        source, asks, place, gone = self._places(L)
        queries = Layout.known(call.queries.host.take(source).only(asks), device)
        return queries, Way.of(source, place, gone, call.queries), mask_of(asks, device)

    def _places(self, queries: int) -> tuple[Array, Array, Array, Array]:
        """From the first block on, which query each column holds, and whether it does; and where each query is, if
        anywhere."""
        grid = self.grid
        before = grid.place.shape[1] - queries
        source = grid.source[:, self.first :] - before
        asks, place = grid.held[:, self.first :] & (source >= 0), grid.place[:, before:]
        at = (place.clip(max=grid.columns - 1) - self.first).clip(min=0)
        return source.clip(min=0, max=max(0, queries - 1)), asks, at, place >= grid.columns

    @cached_property
    def host(self) -> tuple[Tensor, Tensor]:
        """Links and their weights, on the host; found when they are asked for first."""
        call = self.given
        found = call.keys.plan(("links", call.blocks, call.q.shape[2]), lambda: Links(call, self.grid))
        return found.links, found.weight

    @cached_property
    def links(self) -> Tensor:
        return self.host[0].to(self.call.q.device)

    @cached_property
    def weight(self) -> Tensor:
        return self.host[1].to(self.call.q.device)

    def with_keys(self) -> PatternCall:
        """Keys and values in the grid's columns, so that a link is one contiguous run."""
        call = self.call
        k, v = (packed(self.grid.pack(x)) for x in (call.k, call.v))
        stays = not self.moved and k.shape[2] == call.k.shape[2]
        # without the columns that they came from: biases keep the call until backward
        return replace(call, k=k, v=v, columns=None, keys=call.keys if stays else self.grid.keys)

    def back(self, out: Tensor) -> Tensor:
        """Outputs at the queries' own columns; zeros at padding."""
        if not self.moved:
            return out
        queries, L = self.given.queries, self.given.q.shape[2]

        def find() -> Way:
            source, asks, place, _ = self._places(L)
            return Way.of(place, source, ~asks, queries)

        found = self.given.keys.plan(("back", self.block, L), find).go(out)
        return found if queries.asked is None else found.masked_fill(~queries.asked, 0)


def with_whole_rows(call: PatternCall) -> PatternCall:
    """The call with its rows that see all marked: they run as those of global tokens, but are seen as what they are."""
    reach, queries = call.blocks, call.queries.host
    if reach.whole is None:
        return call
    everything = reach.whole(queries.position // reach.size, reach.blocks_of(queries.length))
    marked = queries.is_global | (everything & queries.valid)
    return replace(call, queries=call.queries.plan(("whole", reach), lambda: call.queries.with_globals(marked)))


def _run(call: PatternCall) -> Tensor:
    laid = Laid(call)
    biases = _Biases(laid.call, laid.grid.keys, laid.block)
    call = laid.call
    # a few queries against a long cache: take the columns that they need, and leave the others where they are
    few = laid.links[0].numel() * laid.block < call.k.shape[1] * call.k.shape[2]
    call = replace(call, k=packed(call.k), v=packed(call.v)) if few else laid.with_keys()
    steps = _steps(call, biases, laid, tensor_of(laid.grid.source, call.k.device) if few else None)
    return laid.back(run_local(call, steps, laid.asked, None if few else laid.first))


BLOCKS: Kernel[PatternCall] = Kernel(
    "blocks",
    _run,
    (facts.own_keys, fills_blocks),
    "key blocks gathered for a few query blocks a step; backward recomputes",
    (facts.is_blocks,),
)


def _steps(call: PatternCall, biases: _Biases, laid: Laid, source: Tensor | None) -> list[Tile]:
    """Local tiles.

    Args:
        source: the call's columns that make up the blocks; None: k and v are laid out in blocks.
    """
    links, first = laid.links, laid.first
    block, end = biases.block, first + call.q.shape[2]
    weight = laid.weight.to(torch.promote_types(call.q.dtype, torch.float32))
    plain = biases.plain(*map(array_of, laid.host))
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

    def __init__(self, call: PatternCall, keys: Layout, block: int):
        self.block, self.causal = block, call.pattern.causal
        self.device = call.k.device
        self.host = keys.host.valid & ~keys.host.is_global
        self.usable = None
        if not bool(self.host.all()):
            usable = keys.plan("usable", lambda: tensor_of(self.host, self.device))
            self.usable = usable.unflatten(1, (-1, block))
        self.by_distance = by_distance(call, keys.valid.shape[1])

    def plain(self, links: Array, weight: Array) -> list[bool]:
        """For each row of query blocks, whether it sees all it is linked to, unweighted: then it has no bias."""
        if self.causal or self.by_distance is not None:
            return [False] * links.shape[2]
        seen = weight == 0
        if self.usable is not None:
            whole = self.host.reshape(len(self.host), -1, self.block).all(-1)
            seen = seen & whole[np.arange(len(whole))[:, None, None, None], links]
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
