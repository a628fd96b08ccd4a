"""One step of LSH attention: what the newest token of a growing document attends to, without sorting it all again.

A document's sorted order changes by one place a step. So the order of an older prefix is kept, with where each bucket
starts in it (`Sorted`), and the tokens since then are merged in by rank: the token of rank n is either one of theirs or
that of rank n - (theirs before it) in the old order. A step reads its windows alone, rounds · (look_back + 1) · chunk
keys a head, and sorts the `recent` tokens; once these are many, all are sorted again. Where fewer keys are held than
windows have places, it reads all of them, each by the times that windows show it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.lsh.chunks import _factor, _keys
from attention_zoo.ops.softmax.pages import rows_of

RECENT = 1024
"""Tokens that are merged at each step, at most."""


class Sorted(NamedTuple):
    """The order of the first n columns; fillers come first.

    Fields:
        order: [B, H, R, n], columns by (bucket, place).
        starts: [B, H, R, buckets + 1], how many of them lie in buckets before each; the last: all.
    """

    order: Int[Tensor, "B H R n"]
    starts: Int[Tensor, "B H R b"]

    @staticmethod
    def of(buckets: Int[Tensor, "B H R n"], valid: Bool[Tensor, "B n"], count: int) -> Sorted:
        """Sort these columns, whose buckets are below `count`."""
        label = buckets.masked_fill(~valid[:, None, None], -1)
        label, order = label.sort(dim=-1, stable=True)
        borders = torch.arange(count + 1, device=label.device, dtype=label.dtype)
        starts = torch.searchsorted(label, borders.expand(*label.shape[:-1], -1).contiguous())
        return Sorted(order.int(), starts)

    def is_stale(self, columns: int) -> bool:
        """Whether too many columns came since."""
        size = self.order.shape[-1]
        # where sorting the recent ones at each step has cost as much as sorting all of them once
        return columns - size > min(RECENT, max(64, math.isqrt(2 * size)))


def windows(
    held: Sorted,
    buckets: Int[Tensor, "B H R S"],
    fillers: Int[Tensor, "B 1 1 1"],
    *,
    chunk: int,
    look_back: int,
) -> tuple[Int[Tensor, "B H R W"], Bool[Tensor, "B H R W"]]:
    """Columns in the windows of the last token, and which of them it sees: not itself, nor empty slots.

    Args:
        fillers: columns at the left that are no tokens.
    """
    size, columns = held.order.shape[-1], buckets.shape[-1]
    recent, which = buckets[..., size:].sort(dim=-1, stable=True)
    place = torch.arange(columns - size, device=buckets.device)
    rank = held.starts.gather(-1, recent.long() + 1) + place  # of each recent token, in the whole order
    mine = rank.gather(-1, which.argmax(-1, keepdim=True))  # that of the last to come

    tokens = columns - fillers
    chunks = (tokens + chunk - 1) // chunk
    back = torch.arange(look_back + 1, device=buckets.device)
    number = ((mine - fillers) // chunk - back) % chunks  # each document is a ring; a short one shows no chunk twice
    wanted = number[..., None] * chunk + torch.arange(chunk, device=buckets.device)
    there = (wanted < tokens[..., None]) & (back < chunks)[..., None]
    wanted, there = wanted.flatten(-2) + fillers, there.flatten(-2)

    before = torch.searchsorted(rank, wanted)
    at = before.clamp(max=columns - size - 1)
    old = held.order.gather(-1, (wanted - before).clamp(0, size - 1)).long()
    column = torch.where(rank.gather(-1, at) == wanted, size + which.gather(-1, at), old)
    return column, there & (column < columns - 1)


def times_shown(
    column: Int[Tensor, "B H W"], seen: Bool[Tensor, "B H W"], columns: int
) -> Float[Tensor, "B H columns"]:
    """How often windows show each column."""
    shown = torch.zeros(*column.shape[:2], columns, device=column.device)
    return shown.scatter_add_(2, column, seen.to(shown.dtype))


def attend_to_all(
    q: Float[Tensor, "B H D"],
    qk: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    shown: Float[Tensor, "B #H S"],
    *,
    scale: float,
    epsilon: float,
    once: bool,
) -> Float[Tensor, "B H D"]:
    """The last token's output: every key held, `shown` so many times; or its own value where it sees nothing."""
    keys, _ = _keys(qk, epsilon)
    bias = (shown.clamp(max=1) if once else shown).to(keys.dtype).log()
    bias[..., -1].masked_fill_(~shown.any(-1), 0)
    query, values = (x.to(keys.dtype) for x in (q, v))
    out = F.scaled_dot_product_attention(
        query[:, :, None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=bias[:, :, None],
        scale=scale,
    )
    return out[:, :, 0].to(q.dtype)


def attend(
    q: Float[Tensor, "B H D"],
    qk: Float[Tensor, "B room H D"],
    v: Float[Tensor, "B room H D"],
    column: Int[Tensor, "B H W"],
    seen: Bool[Tensor, "B H W"],
    *,
    scale: float,
    epsilon: float,
    once: bool,
    last: int,
) -> Float[Tensor, "B H D"]:
    """The last token's output: one softmax over the windows of all rounds, or its own value where it sees nothing."""
    (B, H, D), room = q.shape, qk.shape[1]
    row = torch.arange(B, device=q.device)[:, None, None]
    head = torch.arange(H, device=q.device)[:, None]
    if once:  # what is shown again stands beside itself in order
        column = column.masked_fill(~seen, room).sort(-1).values
        seen = (column < room) & (column != F.pad(column, (1, -1), value=-1))
        column = column.clamp(max=last)  # behind it there may be anything
    places = ((row * room + column) * H + head).flatten()
    chosen, values = (rows_of(x.reshape(-1, D), places).view(*column.shape, D) for x in (qk, v))
    chosen = chosen.to(torch.promote_types(q.dtype, torch.float32))
    # scores are scaled, not keys: they are D times smaller
    scores = (chosen @ q[..., None].to(chosen.dtype) * _factor(chosen, epsilon))[..., 0] * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights[..., None, :] @ values.to(chosen.dtype))[..., 0, :].to(q.dtype)
    return torch.where(seen.any(-1, keepdim=True), out, v[:, last])
