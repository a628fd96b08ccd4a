"""A recurrence over blocks of tokens: vectors that look at themselves and at a block, and are renewed through a gate.

    seen  = norm(c) + identity                            K, V, q, q_x: heads of seen
    found = [softmax(q Kᵀ) V ; softmax(q_x K_xᵀ) V_x]     x: the tokens of the block, whose keys and values are given
    z     = W found + b
    fixed gate   c <- c ⊙ g + z ⊙ (1 - g),   g = sigmoid(keep)
    LSTM gate    c <- c ⊙ sigmoid(f + 1) + tanh(z) ⊙ sigmoid(i - 1),   [z; f; i] = W found + b

Hutchins et al. 2022, §3. Turns wait for one another, so each is a few large operations, for all lanes at once; one
product gives keys, values and queries of what the turn before has left. Of each block the vectors, their keys and
values and what they found are kept; what is cheaper to compute again than to keep (normalised vectors, queries, scores)
is computed again in backward, where gradients of weights are products over many blocks at once. O(n·S·E) memory for n
blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.recurrence.back import Back
from attention_zoo.ops.recurrence.turns import EPS, Course, Run, Weights, renewed
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages


def recur(
    first: Float[Tensor, "m S E"],
    k: Float[Tensor, "n K W D"],
    v: Float[Tensor, "n K W D"],
    weights: Weights,
    course: Course,
) -> tuple[Float[Tensor, "N S K D"], Float[Tensor, "N S K D"], Float[Tensor, "N S E"] | None]:
    """All states, those that blocks leave behind those that are there `first`: keys, values and vectors of each.

    Args:
        first: the vectors that are there before the first turn.
        k, v: of the tokens of each block, in the order of turns.
    """
    if not len(course.counts):
        keys, values = _Unmoved.apply(first, k.shape[1], k.shape[3], *weights)
        return keys, values, first if course.keeps else None
    return _Recur.apply(first, k, v, course, *weights)


class _Unmoved(torch.autograd.Function):
    """Keys and values of the states that are there first, where no block is gone through.

    Weights of what no state goes through have gradients of zeros, as they have wherever there are blocks: processes
    that train together wait for each other's.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, first: Tensor, K: int, D: int, *weights: Any) -> tuple[Tensor, Tensor]:
        identity, into, bias, *_ = weights
        normal, mean, deviation = torch.native_layer_norm(first, first.shape[-1:], None, None, EPS)
        seen = normal.add_(identity)
        made = F.linear(seen, into[: 2 * K * D], None if bias is None else bias[: 2 * K * D])
        ctx.save_for_backward(first, mean, deviation, *weights)
        keys, values = made.view(*first.shape[:2], 2, K, D).unbind(2)
        return keys, values

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, mean, deviation, identity, into, bias, *others = saved
        dmade = torch.stack(grads, 2).view(first.shape[:2].numel(), -1)
        seen = torch.native_layer_norm(first, first.shape[-1:], None, None, EPS)[0].add_(identity)
        rest = len(into) - dmade.shape[1]
        dinto = F.pad(dmade.T @ seen.flatten(0, 1), (0, 0, 0, rest))
        dbias = None if bias is None else F.pad(dmade.sum(0), (0, rest))
        dseen = (dmade @ into[: dmade.shape[1]]).view(first.shape)
        dfirst = torch.ops.aten.native_layer_norm_backward(
            dseen, first, first.shape[-1:], mean, deviation, None, None, [True, False, False]
        )[0]
        unused = (None if each is None else torch.zeros_like(each) for each in others)
        return dfirst, None, None, dseen.sum(0), dinto, dbias, *unused


class _Recur(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, first: Tensor, k: Tensor, v: Tensor, course: Course, *weights: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        run = Run(first, k, v, Weights(*weights), course)
        vectors, kv, found = run.room(first)
        left, held, looked_up = run.by_states(vectors), run.by_states(kv, 1), run.by_blocks(found)
        places = run.by_heads(found).split(run.counts, 1)
        left[0].copy_(first)
        gate = run.gate()
        for turn, count in enumerate([*course.counts, 0]):
            projected = run.project(run.seen(left[turn])[0], None if count else slice(run.KV))
            if not count:
                held[turn].copy_(run.by_heads(projected))
                break
            for_keys, for_queries = projected.split([run.KV, projected.shape[2] - run.KV], 2)
            held[turn].copy_(run.by_heads(for_keys))
            before, own = run.chosen(left[turn], turn), run.chosen(held[turn], turn, 1)
            queries = run.by_heads(run.chosen(for_queries, turn)).contiguous()
            looked, by_kinds = run.room_by_kinds("found", tuple(queries.shape), queries)
            for look, into in zip(run.looks(queries, own, turn), by_kinds):
                look.forward(into)
            places[turn].copy_(looked)
            renewed(before, run.raw(looked_up[turn]), gate, into=left[turn + 1])
        ctx.save_for_backward(k, v, vectors, kv, found, *weights)
        ctx.course, ctx.first = course, len(first)
        keys, values = kv.transpose(2, 3).unbind(0)
        return keys, values, vectors if course.keeps else None

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> tuple[Tensor | None, ...]:
        k, v, vectors, kv, found, *weights = saved
        run = Run(vectors[: ctx.first], k, v, Weights(*weights), ctx.course)
        back = Back(run, vectors, kv, found, grads)
        dkeys, dvalues = (large_pages(vectors.new_empty(x.shape)) for x in (k, v))
        for_keys, for_values = (run.by_blocks(x.flatten(0, 1), run.K) for x in (dkeys, dvalues))
        for turn in reversed(range(run.G)):
            back.through_projections(turn + 1)
            before, own = run.chosen(back.left[turn], turn), run.chosen(back.held[turn], turn, 1)
            dfound, delta = back.through_gate(turn, before)
            queries = back.asked(turn)
            dqueries, of_queries = run.room_by_kinds("dqueries", tuple(queries.shape), queries)
            down, of_own = run.room_by_kinds("dkv", tuple(own.shape), queries)
            of_blocks = for_keys[turn], for_values[turn]
            parts = zip(run.looks(queries, own, turn), dfound, delta, of_queries, (of_own, of_blocks))
            for look, grad, gap, dq, (dk, dv) in parts:
                look.backward(grad, gap, dq, dk, dv)
            back.hand(turn, down, dqueries)
        back.through_projections(0)
        return back.mine("dvectors", -1), dkeys.to(k.dtype), dvalues.to(v.dtype), None, *back.weights()
