"""Patterns of blocks in FlexAttention: a pair is seen whose key lies in a block that the query's row is linked to.

The rows of blocks that a call has, each once, make a table of links; a query knows its row, a key its block, both by
position, so that tokens may stand anywhere. Linear memory. Lists of blocks to visit are each head's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import array_of, tensor_of
from attention_zoo.layout.reach import Blocks
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.heads import Heads, SomeHeads

Found = TypeVar("Found")
Mod = Callable[..., Tensor]


class Linked(NamedTuple):
    """What says which keys a query sees; T rows of blocks, of documents of as many blocks, m links of each.

    Fields:
        row: of each query its row of the table.
        block: of each key the block of its document that it lies in.
        links: blocks that rows see, -1: no more.
        weight: what links add to scores; None: nothing.
        whole: which rows see everything in their documents, unweighed; None: none do.
    """

    row: Int[Tensor, "#B L"]
    block: Int[Tensor, "#B S"]
    links: Int[Tensor, "H T m"]
    weight: Float[Tensor, "H T m"] | None
    whole: Int[Tensor, " T"] | None


def link_functions(of: Linked) -> tuple[Mod, Mod]:
    """Whether a pair is linked, and what links add to its score; of tensors that the compiler captures."""
    rows, blocks, links, weight, whole = of
    count = links.shape[2]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, block = rows[b, i], blocks[b, j]
        found = links[h, row, 0] == block
        for n in range(1, count):
            found = found | (links[h, row, n] == block)
        return found if whole is None else found | (whole[row] > 0)

    def added(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert weight is not None
        row, block = rows[b, i], blocks[b, j]
        total = torch.where(links[h, row, 0] == block, weight[h, row, 0], 0)
        for n in range(1, count):
            total = total + torch.where(links[h, row, n] == block, weight[h, row, n], 0)
        return total

    return sees, added


def linked(call: PatternCall, rows: int, columns: int) -> Linked:
    """Of the call's queries and keys, filled up to so many; found once for a layout."""
    # the plan keeps what the key's id is of
    key = ("flex links", call.blocks, id(call.queries), rows, columns, call.q.dtype)

    def find() -> Linked:
        return kept(call, ("flex links", rows, columns), lambda: _linked(call, rows, columns))

    return call.keys.plan(key, lambda: (find(), call.queries))[0]


def kept(call: PatternCall, what: tuple[object, ...], make: Callable[[], Found]) -> Found:
    """What follows from the call's tokens, from call to call where their shape implies them: links are costly."""
    keys = call.keys
    if not (call.queries is keys and keys.dense and keys.starts_at_zero):
        return make()
    host = keys.host
    key = (*what, call.pattern.causal, *keys.valid.shape, host.is_global.tobytes(), host.length.tobytes())
    return call.blocks.kept((*key, call.q.dtype, call.q.device), make)


def _linked(call: PatternCall, rows: int, columns: int) -> Linked:
    reach, queries, keys, device = call.blocks, call.queries.host, call.keys.host, call.q.device
    own, count = queries.position // reach.size, reach.blocks_of(queries.length)
    pairs = np.stack([np.where(queries.valid, x, 0) for x in (own, count)]).reshape(2, -1)
    asked, at = np.unique(pairs, axis=1, return_inverse=True)
    links, weight = (array_of(x)[0] for x in reach.lists(asked[:1], asked[1:]))
    hidden = weight == -np.inf
    links, weight = np.where(hidden, -1, links), np.where(hidden, 0, weight)
    whole = None
    if reach.whole is not None:
        whole = np.asarray(reach.whole(asked[0], asked[1]))
        weight = np.where(whole[:, None], 0, weight)
    # of few sizes, since kernels are compiled for each
    more = (1 << (len(asked[0]) - 1).bit_length()) - len(asked[0])

    def table(x: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, more), (0, 0)), constant_values=fill)

    def places(x: np.ndarray, size: int) -> Tensor:
        return tensor_of(np.pad(x, ((0, 0), (0, size - x.shape[1]))).astype(np.int32), device)

    exact = torch.promote_types(call.q.dtype, torch.float32)
    block = np.where(keys.valid, keys.position // reach.size, 0)
    return Linked(
        places(at.reshape(own.shape), rows),
        places(block, columns),
        tensor_of(table(links, -1).astype(np.int32), device),
        tensor_of(table(weight), device).to(exact) if weight.any() else None,
        None if whole is None or not whole.any() else tensor_of(np.pad(whole, (0, more)).astype(np.int32), device),
    )


def head_by_head(call: PatternCall) -> list[PatternCall]:
    """The call of each head, whose reach is its own links."""
    return [replace(call, pattern=_OneHead(call, (head,))) for head in range(call.q.shape[1])]


class _OneHead(SomeHeads):
    """A pattern of blocks of which there is this head alone."""

    def __init__(self, call: PatternCall, heads: Heads):
        super().__init__(call.pattern, heads)
        given, some = call.blocks, list(heads)

        def links(row: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
            found, weight = given.links(row, blocks)
            return found[:, some], weight[:, some]

        self.reach: Blocks = replace(given, links=links)
