"""A strided convolution of keys and values behind a null key and a null value, for one kernel over all of them.

    k'_0 = null,    k'_(g+1) = b + sum_t W_t k_(g·c + t),    zeros behind the last group;    v' likewise

One function forward and one backward, for GPUs, where launches cost: what attention/memory_compressed.py says in
operators that autograd records, and both are held to the same loop in the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.pooled import Pooled
from attention_zoo.ops.pattern.bags import Bags, bags_both_ways
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast


class Strides(NamedTuple):
    """What follows from the layout, for G groups of c tokens in each of B rows.

    Fields:
        members: rows of all tokens, group after group.
        missing: [B·G·c, 1], which of them are none; None: no one is missing.
        back: from members to tokens.
        groups: G.
        columns: with the null key, and fillers.
        channels: of a key, and zeros behind them.
    """

    members: Int[Tensor, " n"]
    missing: Bool[Tensor, "n 1"] | None
    back: Bags
    groups: int
    columns: int
    channels: int


def convolved(
    k: Float[Tensor, "B K L D"],
    v: Float[Tensor, "B K L D"],
    weight: Float[Tensor, "KD D c"],
    bias: Float[Tensor, " KD"],
    nulls: tuple[Float[Tensor, " KD"], Float[Tensor, " KD"]],
    strides: Strides,
) -> tuple[Float[Tensor, "B K S E"], Float[Tensor, "B K S E"]]:
    """Keys and values of the null and of all groups, E of `Strides` channels wide."""
    return _Convolved.apply(k, v, weight, bias, *nulls, strides)


class _Convolved(torch.autograd.Function):
    """Members stand in [K, 2·B·G, D·c]: one product a head, by the weights as they lie in memory."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        (*nulls, strides), (B, K, L, D), c = rest, k.shape, weight.shape[2]
        x = torch.stack([k.transpose(1, 2), v.transpose(1, 2)], 2)
        ctx.shape, ctx.strides = x.shape, strides
        taken = x.view(B * L, -1).index_select(0, strides.members)
        if strides.missing is not None:
            taken = taken.masked_fill_(strides.missing, 0)
        apart = taken.view(B, strides.groups, c, 2, K, D).permute(4, 3, 0, 1, 5, 2)
        members = apart.reshape(K, 2 * B * strides.groups, D * c)
        weight_, bias_ = (each.to(k.dtype) for each in (weight, bias))
        made = torch.baddbmm(bias_.view(K, 1, D), members, weight_.view(K, D, -1).transpose(1, 2))
        whole = k.new_zeros(2, B, strides.columns, K, strides.channels)
        whole[:, :, 0, :, :D] = torch.stack(nulls).view(2, 1, K, D)
        whole[:, :, 1 : 1 + strides.groups, :, :D] = made.view(K, 2, B, -1, D).permute(1, 2, 3, 0, 4)
        ctx.save_for_backward(members, weight)
        ctx.dtypes = [each.dtype for each in (bias, *nulls)]
        keys, values = whole.unbind()
        return keys.transpose(1, 2), values.transpose(1, 2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (members, weight), strides = saved, ctx.strides
        (B, _, _, K, D), G, c = ctx.shape, strides.groups, weight.shape[2]
        grad = torch.stack([dk, dv])
        grad = grad if strides.channels == D else grad[..., :D]
        dnulls = grad[:, :, :, 0].sum(1).view(2, -1).unbind()
        dmade = grad[:, :, :, 1 : 1 + G].permute(2, 0, 1, 3, 4).reshape(K, -1, D)
        dbias = dmade.sum(1).view(-1)
        dweight = torch.bmm(dmade.transpose(1, 2), members).view(weight.shape)
        dmembers = torch.bmm(dmade, weight.view(K, D, -1).to(dmade.dtype))
        rows = dmembers.view(K, 2, B, G, D, c).permute(2, 3, 5, 1, 0, 4).reshape(B * G * c, 2 * K * D)
        dx_k, dx_v = strides.back.sums(rows).view(ctx.shape).unbind(2)
        rest = (each.to(dtype) for each, dtype in zip((dbias, *dnulls), ctx.dtypes))
        return dx_k.transpose(1, 2), dx_v.transpose(1, 2), dweight.to(weight.dtype), *rest, None


def strides_of(layout: Layout, groups: Pooled, columns: int, channels: int, like: Tensor) -> Strides:
    """Of the groups of a layout's tokens; the same object for the same of all."""
    key = ("strides", id(groups.members), columns, channels, like.dtype)
    # the plan keeps what the key's id is of
    return layout.plan(key, lambda: (_strides(layout, groups, columns, channels, like), groups))[0]


def _strides(layout: Layout, groups: Pooled, columns: int, channels: int, like: Tensor) -> Strides:
    B, L = layout.host.valid.shape
    G, c = groups.columns.shape[1:]
    columns_of = (groups.columns + np.arange(B)[:, None, None] * L).reshape(-1)
    there = groups.columns.reshape(-1) >= 0
    entries = there.nonzero()[0]
    back, _ = bags_both_ways(columns_of[entries], entries, None, targets=B * L, sources=B * G * c, like=like)
    missing = None if bool(there.all()) else tensor_of(~there[:, None], like.device)
    return Strides(tensor_of(np.where(there, columns_of, 0), like.device), missing, back, G, columns, channels)
