"""One step of H-Transformer-1D: the next token reads block · log S keys of what is held, and adds one group to it.

A group of level l is first asked for 2^l tokens after its last one. So there is time to make but one group a token, and
each token's column has room for one: a document's groups stand beside its tokens, spread over them.

    group g of level l stands at    position (g + 1)·2^l + 2^(l-1) - 1,   at or before the first token that asks for it
    position p has the group of     level 1 + (how often 2 divides p + 1), none where p + 1 is a power of two
    its halves are                  level 1: tokens p - 2 and p - 1;  above: the groups at p - 3·2^(l-2) and p - 2^(l-2)

Groups that are held never change, so states are cut, copied and put in another order like any other columns. It takes
rows that hold consecutive tokens of one document from its first on; then every group that is asked for is full.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, Ledger, gathered, goes_on
from attention_zoo.ops.pattern.row import attend_to, in_order


def is_step(layout: Layout, ledger: Ledger) -> bool:
    """Whether this is one more token for each row of a state that holds documents from their first tokens on."""
    if layout.valid.shape[1] != 1 or torch.is_grad_enabled() or not in_order(ledger) or not goes_on(ledger, layout):
        return False
    first = ledger.filled - layout.host.position[:, 0]  # where the first token must stand
    return bool((first >= 0).all() and np.take_along_axis(ledger.fields.host.valid, first[:, None], 1).all())


def with_groups(columns: Columns) -> Columns:
    """Keys and values, and beside them the groups that stand at their columns, [B, K, room, 2D]."""
    k, v, *known = columns.buffers
    if known:
        return columns
    host = columns.ledger.host
    empty = host.valid.shape[1] - 1 - host.position[:, -1:]  # columns before the document
    column = np.arange(columns.filled)
    below = gathered(torch.cat(columns.held, -1), tensor_of((column + empty).clip(max=columns.filled - 1), k.device))
    groups = torch.zeros_like(below)
    size = 2
    while size <= columns.filled:
        below = below[:, :, : below.shape[2] // 2 * 2].unflatten(2, (-1, 2)).mean(3)
        into = groups[:, :, size + size // 2 - 1 :: size]
        into.copy_(below[:, :, : into.shape[2]])
        size *= 2
    with torch.inference_mode(False):  # it may be written to outside of that mode, too
        held = torch.zeros(*k.shape[:-1], 2 * k.shape[-1], dtype=k.dtype, device=k.device)
    held[:, :, : columns.filled] = gathered(groups, tensor_of((column - empty).clip(min=0), k.device))
    return Columns((k, v, held), columns.ledger)


def append(
    columns: Columns, layout: Layout, k: Float[Tensor, "B K 1 D"], v: Float[Tensor, "B K 1 D"], horizon: Horizon
) -> Columns:
    """These columns `with_groups`, the next token, and the group that stands beside it."""
    ledger = columns.ledger

    def find() -> tuple[Tensor, Tensor, Ledger]:
        halves, of_tokens = _halves(layout.host.position[:, 0])
        device = layout.valid.device
        return tensor_of(halves + ledger.filled, device), tensor_of(of_tokens[:, None, None, None], device), ledger

    # the key's id stays its own: the plan keeps the ledger
    halves, of_tokens, _ = layout.plan(("halves", id(ledger.fields), ledger.filled), find)
    keys, values, groups = (gathered(x, halves) for x in columns.buffers)
    group = torch.where(of_tokens, torch.cat([keys, values], -1), groups).mean(2, keepdim=True)
    return columns.append(layout, k, v, group.to(k.dtype), horizon=horizon)


def attend(
    q: Float[Tensor, "B H 1 D"], queries: Layout, columns: Columns, *, block: int, scale: float
) -> Float[Tensor, "B H 1 D"]:
    """What the last token held sees of near tokens and of groups."""
    ledger, (k, v, groups) = columns.ledger, columns.buffers
    key = ("step", id(ledger.fields), ledger.filled, block, k.shape[1], k.dtype)
    read = queries.plan(key, lambda: _read(queries.host.position[:, 0], columns, block))
    shape = (*k.shape[:2], -1, k.shape[3])
    k, v = (x.reshape(-1, x.shape[3]).index_select(0, read.near).view(shape) for x in (k, v))
    if len(read.far):
        far = groups.reshape(-1, groups.shape[3]).index_select(0, read.far).view(*shape[:3], groups.shape[3])
        k, v = (torch.cat(pair, 2) for pair in zip((k, v), far.chunk(2, 3)))
    return attend_to(q.to(k.dtype), k, v, read.bias, scale, None).to(q.dtype)


class _Read(NamedTuple):
    """What a step reads of the buffers.

    Fields:
        near, far: of tokens and of groups, [B·K·n], rows of a buffer as [B·K·room, ...].
        bias: [B, 1, 1, n], of both: log of what each counts for, or -inf.
        ledger: what this is for.
    """

    near: Int[Tensor, " n"]
    far: Int[Tensor, " m"]
    bias: Float[Tensor, "B 1 1 S"]
    ledger: Ledger


def _read(position: Int[np.ndarray, " B"], columns: Columns, block: int) -> _Read:
    k = columns.buffers[0]
    last, bias, rows = columns.filled - 1, [], []
    for at, weight in (_near(position, block), _far(position, block)):
        seen = np.isfinite(weight)
        used = seen.any(0)
        # what one row does not see is any column that it holds: padding may be anything
        column = np.where(seen, at + (last - position)[:, None], last)[:, used]
        first = np.arange(k.shape[0] * k.shape[1]).reshape(*k.shape[:2], 1) * k.shape[2]
        rows.append(tensor_of((first + column[:, None]).ravel(), k.device))
        bias.append(weight[:, used])
    added = tensor_of(np.concatenate(bias, 1)[:, None, None], k.device).to(k.dtype)
    return _Read(rows[0], rows[1], added, columns.ledger)


_Places = tuple[Int[np.ndarray, "B n"], Float[np.ndarray, "B n"]]
"""Positions, and the weight of what stands there: the log of how many tokens it counts for, or -inf."""


def _near(position: Int[np.ndarray, " B"], block: int) -> _Places:
    """Tokens: those of the own block and of the one before."""
    at = (position // block * block - block)[:, None] + np.arange(2 * block)
    return at, np.where((at >= 0) & (at <= position[:, None]), 0.0, -np.inf)


def _far(position: Int[np.ndarray, " B"], block: int) -> _Places:
    """Where groups of all levels stand: those in the block before the own one, but for what the finer level has."""
    levels = max(0, int(position.max()) // block).bit_length() - 1
    size = 2 ** np.arange(1, levels + 1)[:, None]
    half = block // 2
    fine = position[:, None, None] // (half * size)  # which block of the level below
    group = (fine // 2 - 1) * block + np.arange(block)
    there = (group >= 0) & (group < (fine - 1) * half)
    weight = np.where(there, np.log(size), -np.inf)
    at = (group + 1) * size + size // 2 - 1
    return at.reshape(len(position), -1), weight.reshape(len(position), -1)


def _halves(position: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, "B 2"], Bool[np.ndarray, " B"]]:
    """How far before the next token the halves of its group stand, below 0, and whether they are tokens."""
    after = position + 1
    half: Array = after & -after  # tokens of a half
    back = np.stack([3 * half, half], 1) // 2
    of_tokens = half == 1
    back[of_tokens] = 2, 1
    # no group: what is made of any column is never read
    back[after == half] = 1
    return -back, of_tokens
