"""One query a row of a pattern made of blocks (BigBird), on a state whose columns are consecutive tokens.

It reads its linked blocks and the global tokens alone, so that a step costs the same whatever the length of the state;
and all keys that are held, without a copy, where those are all. Which columns it reads changes when a row begins
another block: that is found once a block, and kept beside the fields that say what the columns are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.ledger import Ledger
from attention_zoo.layout.reach import Blocks
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.row import Listed, attend_to, in_order, listed_globals
from attention_zoo.ops.softmax.pages import rows_of
from attention_zoo.tokens import Tokens


class Linked(NamedTuple):
    """What the tokens of one block of each row read.

    Fields:
        blocks, listed, key: what it was found for.
        column: [B, H, n], columns, at last those of the own block, of which some are still to come.
        bias: [B, H, n], what is added to the scores; None: nothing.
    """

    blocks: Blocks
    listed: Array
    key: tuple[bytes, bytes]
    column: Int[Tensor, "B H n"]
    bias: Float[Tensor, "B H n"] | None


def _held_in_order(call: PatternCall) -> str | None:
    held = call.columns
    if held is not None and in_order(held.ledger):
        return None
    return "the keys are not held by a state whose columns are consecutive tokens"


def _sees_links(call: PatternCall) -> str | None:
    # the first block's own tokens see nothing but global keys before them
    queries = call.queries.host
    late = queries.is_global & (queries.position >= call.blocks.size)
    return "a global query sees every key" if bool(late.any()) else None


def _run(call: PatternCall) -> Tensor:
    held, size = call.columns, call.blocks.size
    assert held is not None
    listed, filled = listed_globals(held.ledger), held.filled
    if not call.has_position_bias and _all_are(listed):
        return attend_to(call.q, call.k, call.v, None, call.scale, call.sink)
    linked, at = _linked(call, held.ledger, listed), call.queries.host.position[:, 0] % size
    most = int(at.max())
    count, ragged = linked.column.shape[2] - (size - 1 - most), bool((at != most).any())
    column, bias = linked.column[..., :count], None if linked.bias is None else linked.bias[..., :count]
    if bias is None and count == filled and not ragged and not call.has_position_bias:
        # different columns, as many as there are
        return attend_to(call.q, call.k, call.v, None, call.scale, call.sink)
    if ragged:
        bias = column.new_zeros(column.shape, dtype=torch.float32) if bias is None else bias.clone()
        to_come = tensor_of(np.arange(most + 1) > at[:, None], column.device)
        bias[..., -most - 1 :].masked_fill_(to_come[:, None], -torch.inf)
        column = column.clamp(max=filled - 1)
    if call.has_position_bias:
        more = _position_bias(call, column, call.queries.position[:, :, None] - (filled - 1))
        bias = more if bias is None else more + bias
    k, v = _gathered(held.buffers, column)
    return attend_to(call.q, k, v, None if bias is None else bias[:, :, None], call.scale, call.sink)


def _all_are(listed: Listed) -> bool:
    """Whether all columns are of global tokens."""
    return listed.columns.shape[1] == listed.filled and bool((listed.columns >= 0).all())


def _linked(call: PatternCall, ledger: Ledger, listed: Listed) -> Linked:
    """As it was found for another token of the same block, if it was."""
    position = call.queries.host.position
    key = (position // call.blocks.size).tobytes(), (position - ledger.filled).tobytes()
    # one for each pattern, of the last block alone: they are as large as what a step reads
    kept: dict[int, Linked] = ledger.fields.__dict__.setdefault("_linked", {})
    known = kept.get(id(call.blocks))
    if known is None or known.blocks is not call.blocks or known.listed is not listed.columns or known.key != key:
        known = Linked(call.blocks, listed.columns, key, *_find(call, ledger, listed.columns))
        kept[id(call.blocks)] = known
    return known


def _find(call: PatternCall, ledger: Ledger, listed: Array) -> tuple[Tensor, Tensor | None]:
    size, host, last = call.blocks.size, ledger.fields.host, ledger.filled - 1
    position = call.queries.host.position
    links, weights = _links(call.blocks, position // size)
    (B, H, _), own = links.shape, slice(-size, None)
    column = links[..., None] * size + np.arange(size) + (last - position)[:, None, None]
    column, weight = column.reshape(B, H, -1), weights.repeat(size, -1)
    row, there = np.arange(B)[:, None, None], column.clip(0, last)
    # global tokens count once: in their own list; what is still to come of the own block is none
    seen = (column > last) | (host.valid[row, there] & ~host.is_global[row, there])
    weight = np.where(seen & (column >= 0), weight, -np.inf)
    # in front of the own block global tokens and other blocks, without what nobody sees
    some = np.broadcast_to(listed[:, None], (B, H, listed.shape[1]))
    others = np.concatenate([some, column[..., :-size]], -1)
    scores = np.concatenate([np.where(some < 0, -np.inf, 0), weight[..., :-size]], -1)
    order = np.argsort(scores > -np.inf, axis=-1, kind="stable")[..., int((scores == -np.inf).sum(-1).min()) :]
    # before the first column where a document goes on that nobody holds: hidden, and yet read
    column = np.concatenate([np.take_along_axis(others, order, -1).clip(0, last), column[..., own].clip(0)], -1)
    weight = np.concatenate([np.take_along_axis(scores, order, -1), weight[..., own]], -1)
    device = call.q.device
    return tensor_of(column, device), tensor_of(weight, device).float() if weight.any() else None


def _links(blocks: Blocks, row: Int[np.ndarray, "B 1"]) -> tuple[Array, Array]:
    """Blocks that these rows are linked to, and weights, [B, H, m]: the same for many steps."""

    def find() -> tuple[bytes, Array, Array]:
        links, weight = (x[:, :, 0].numpy(force=True) for x in blocks.lists(row, np.zeros_like(row)))
        listed = weight > -np.inf
        listed[..., -1] = True  # the own block, which stays the last
        # a document has fewer blocks than are asked for at first
        order = np.argsort(listed, axis=-1, kind="stable")[..., int((~listed).sum(-1).min()) :]
        return row.tobytes(), np.take_along_axis(links, order, -1), np.take_along_axis(weight, order, -1)

    # of the last rows alone
    known: dict[str, tuple[bytes, Array, Array]] = blocks.kept("row", dict)
    if "last" not in known or known["last"][0] != row.tobytes():
        known["last"] = find()
    return known["last"][1:]


def _position_bias(call: PatternCall, column: Int[Tensor, "B H n"], shift: Int[Tensor, "B 1 1"]) -> Tensor:
    """What the position scheme adds, [B, H, n]; `shift` leads from columns to positions."""
    B, H, _ = column.shape
    # schemes give all heads of a row the same keys: let each head be a row, and take its own bias
    queries = Tokens(*(field.repeat_interleave(H, 0) for field in call.queries))
    keys = (column + shift).flatten(0, 1)
    like = torch.ones_like(keys, dtype=torch.bool)
    found = call.pattern.position_bias(queries, Tokens(keys, like, ~like, torch.zeros_like(keys), keys))
    assert found is not None
    return found[:, :, 0].unflatten(0, (B, H)).diagonal(dim1=1, dim2=2).transpose(1, 2)


def _gathered(buffers: Sequence[Float[Tensor, "B K room D"]], column: Int[Tensor, "B H n"]) -> Iterator[Tensor]:
    """Each head's own columns of each buffer, [B, H, n, D]."""
    B, K, room, D = buffers[0].shape
    group, device = column.shape[1] // K, column.device
    first = torch.arange(0, B * K * room, room, device=device).view(B, K, 1).expand(-1, -1, group).reshape(B, -1, 1)
    index = (first + column).flatten()
    return (rows_of(buffer.view(-1, D), index).view(*column.shape, D) for buffer in buffers)


LINKED_ROW: Kernel[PatternCall] = Kernel(
    "linked_row",
    _run,
    (facts.one_query, facts.no_gradients, facts.every_row, _held_in_order, facts.causal, _sees_links),
    "one query on a cache: its linked blocks and global tokens alone, O(1)",
    (facts.is_blocks,),
)
