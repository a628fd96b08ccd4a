"""A recurrence over blocks of tokens: vectors that look at themselves and at a block, and are renewed through a gate.

    seen  = norm(c) + identity                            K, V, q, q_x: heads of seen
    found = [softmax(q Kᵀ) V ; softmax(q_x K_xᵀ) V_x]     x: the tokens of the block, whose keys and values are given
    z     = W found + b
    fixed gate   c <- c ⊙ g + z ⊙ (1 - g),   g = sigmoid(keep)
    LSTM gate    c <- c ⊙ sigmoid(f + 1) + tanh(z) ⊙ sigmoid(i - 1),   [z; f; i] = W found + b

Hutchins et al. 2022, §3. Turns wait for one another, so each is a few large operations, for all rows at once. Of each
turn the vectors, their keys and values and what they found are kept; what is cheaper to compute again than to keep
(normalised vectors, queries, scores) is computed again in backward. O(G·S·E) memory for G turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.host import tensor_of
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, fold, partial_backward
from attention_zoo.ops.softmax.tiles import scores_at_once

EPS = 1e-5
"""Of the norm, added to the variance."""


class Weights(NamedTuple):
    """What vectors are projected and renewed by, in their precision. KV is 2·K·D, Q is 2·H·D.

    Fields:
        identity: added to the normalised vectors.
        keys, keys_bias: into keys and values, K heads of each.
        queries, queries_bias: into queries to the vectors themselves and to tokens, H heads of each.
        out, out_bias: of what was found: E features for a fixed gate, 3·E (z, f, i) for an LSTM's.
        keep: of a fixed gate; None: the gate is an LSTM's.
    """

    identity: Float[Tensor, "S E"]
    keys: Float[Tensor, "KV E"]
    keys_bias: Float[Tensor, " KV"] | None
    queries: Float[Tensor, "Q E"]
    queries_bias: Float[Tensor, " Q"] | None
    out: Float[Tensor, "F Q"]
    out_bias: Float[Tensor, " F"] | None
    keep: Float[Tensor, " E"] | None


class Course(NamedTuple):
    """How states follow each other, by their numbers (`layout.blocks.Turns`).

    Fields:
        before: the state that each turn begins with.
        stops: whether no gradient goes back to the vectors that a turn leaves; None: nowhere.
        scale: factor on scores.
        keeps: whether the vectors are asked for.
    """

    before: Int[np.ndarray, "B G"]
    stops: Bool[np.ndarray, "B G"] | None
    scale: float
    keeps: bool


def recur(
    first: Float[Tensor, "n S E"],
    k: Float[Tensor, "B K G W D"],
    v: Float[Tensor, "B K G W D"],
    weights: Weights,
    course: Course,
) -> tuple[Float[Tensor, "N S K D"], Float[Tensor, "N S K D"], Float[Tensor, "N S E"] | None]:
    """All states, those that turns leave behind those that are there `first`: keys, values and vectors of each.

    Args:
        first: the vectors that are there before the first turn.
        k, v: of the tokens of each turn's block.
    """
    return _Recur.apply(first, k, v, course, *weights)


class _Recur(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, first: Tensor, k: Tensor, v: Tensor, course: Course, *weights: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        run = _Run(len(first), k, v, Weights(*weights), course)
        vectors, kv, found, lse = run.room(first)
        vectors[: len(first)] = first
        run.project_keys(vectors, kv, slice(0, len(first)))
        for turn in range(run.G):
            before, left = run.before(vectors, turn), run.left(turn)
            for look in run.looks(turn, before, kv):
                look.forward(found[turn], lse[turn])
            vectors[left] = renewed(before, run.raw(found[turn]), run.weights.keep)
            run.project_keys(vectors, kv, left)
        ctx.save_for_backward(k, v, vectors, kv, found, lse, *weights)
        ctx.course, ctx.first = course, len(first)
        keys, values = run.heads(kv, run.K).unbind(2)
        return keys, values, vectors if course.keeps else None

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> tuple[Tensor | None, ...]:
        k, v, vectors, kv, found, lse, *weights = saved
        run = _Run(ctx.first, k, v, Weights(*weights), ctx.course)
        back = _Back(run, vectors, kv, grads)
        dk, dv = (large_pages(torch.empty_like(x, dtype=vectors.dtype)) for x in (k, v))
        handed = None
        for turn in reversed(range(run.G)):
            left = run.left(turn)
            grad = run.stopped(back.through_projections(left, handed), turn)
            before = run.before(vectors, turn)
            dbefore, dfound = back.through_gate(grad, before, vectors[left], found[turn])
            dqueries, dkv = torch.empty_like(dfound), kv.new_empty(run.B, *kv.shape[1:])
            own, block = run.looks(turn, before, kv)
            own.backward(dfound, found[turn], lse[turn], dqueries, *run.heads(dkv, run.K).transpose(1, 3).unbind(2))
            block.backward(dfound, found[turn], lse[turn], dqueries, dk[:, :, turn], dv[:, :, turn])
            handed = back.hand(turn, (dbefore, dkv, dqueries))
        dfirst = back.through_projections(slice(0, ctx.first), back.to_first)
        return dfirst, dk.to(k.dtype), dv.to(v.dtype), None, *back.sums


class _Run:
    """One recurrence: G turns of B rows, in which S vectors of E features with H heads meet K heads of keys.

    States stand one after the other, by their numbers.
    """

    def __init__(self, first: int, k: Tensor, v: Tensor, weights: Weights, course: Course):
        self.k, self.v, self.weights, self.course, self.first = k, v, weights, course, first
        (self.B, self.K, self.G, self.W, self.D), self.S = k.shape, len(weights.identity)
        self.H = len(weights.queries) // (2 * self.D)
        self.scratch = Scratch()

    def room(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For vectors, keys and values [N, S, ·], for what turns find [G, B, S, Q], and its log-sum-exps."""
        N, H = self.first + self.G * self.B, self.H
        sizes = (
            (N, *like.shape[1:]), (N, self.S, 2 * self.K * self.D), (self.G, self.B, self.S, 2 * H * self.D),
            (self.G, 2, self.B, H, self.S, 1),
        )  # fmt: skip
        vectors, kv, found, lse = (large_pages(like.new_empty(size)) for size in sizes)
        return vectors, kv, found, lse

    def left(self, turn: int) -> slice:
        """The numbers of what a turn leaves."""
        start = self.first + turn * self.B
        return slice(start, start + self.B)

    def before(self, states: Float[Tensor, "N S F"], turn: int) -> Float[Tensor, "B S F"]:
        """Those that a turn begins with."""
        numbers = self.course.before[:, turn]
        if bool((np.diff(numbers) == 1).all()):
            return states[numbers[0] : numbers[-1] + 1]
        return states.index_select(0, tensor_of(numbers, states.device))

    def heads(self, x: Float[Tensor, "*rows F"], n: int) -> Float[Tensor, "*rows 2 n D"]:
        return x.unflatten(-1, (2, n, self.D))

    def project_keys(self, vectors: Float[Tensor, "N S E"], kv: Float[Tensor, "N S KV"], states: slice) -> None:
        """Keys and values of these states, into their place."""
        kv[states] = F.linear(self.seen(vectors[states])[0], self.weights.keys, self.weights.keys_bias)

    def seen(self, vectors: Float[Tensor, "n S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors as projections see them; and mean and deviation of each, for backward."""
        normal, mean, deviation = torch.native_layer_norm(vectors, vectors.shape[-1:], None, None, EPS)
        return normal.add_(self.weights.identity), mean, deviation

    def raw(self, found: Float[Tensor, "B S Q"]) -> Float[Tensor, "B S F"]:
        return F.linear(found, self.weights.out, self.weights.out_bias)

    def looks(self, turn: int, before: Float[Tensor, "B S E"], kv: Float[Tensor, "N S KV"]) -> tuple[_Look, _Look]:
        """At the vectors themselves, and at the block."""
        queries = F.linear(self.seen(before)[0], self.weights.queries, self.weights.queries_bias)
        own = self.heads(self.before(kv, turn), self.K).transpose(1, 3).unbind(2)
        block = self.k[:, :, turn], self.v[:, :, turn]
        to_own, to_block = self.heads(queries, self.H).transpose(1, 3).unbind(2)
        return _Look(self, 0, to_own, *own), _Look(self, 1, to_block, *block)

    def stopped(self, grad: Float[Tensor, "B S E"], turn: int) -> Float[Tensor, "B S E"]:
        """What goes on to what a turn leaves."""
        if self.course.stops is None or not self.course.stops[:, turn].any():
            return grad
        return grad.masked_fill(tensor_of(self.course.stops[:, turn], grad.device)[:, None, None], 0)


class _Look:
    """Attention of a turn's queries [B, H, S, D], all of them to all of some keys [B, K, m, D]."""

    def __init__(self, run: _Run, place: int, q: Tensor, k: Tensor, v: Tensor):
        """The first (0) or second (1) of a turn."""
        self.run, self.place, self.q = run, place, q
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)

    def pieces(self) -> Iterator[tuple[slice, slice, slice, bool]]:
        """Batch rows, their key heads, and queries of one step; whether it is the first to see these keys."""
        (B, H, S, _), K = self.q.shape, self.run.K
        limit = scores_at_once(self.q) // (H * self.k.shape[1])
        rows, queries = max(1, limit // S), min(S, max(1, limit))
        for b in range(0, B, rows):
            for at in range(0, S, queries):
                yield slice(b, b + rows), slice(b * K, (b + rows) * K), slice(at, at + queries), not at

    def mine(self, x: Float[Tensor, "B S Q"]) -> Float[Tensor, "B H S D"]:
        return self.run.heads(x, self.run.H)[:, :, self.place].transpose(1, 2)

    def forward(self, found: Float[Tensor, "B S Q"], lse: Float[Tensor, "2 B H S 1"]) -> None:
        into, totals = self.mine(found), lse[self.place]
        for batch, keys, rows, _ in self.pieces():
            q = self.q[batch, :, rows]
            sums = Sums(q, self.run.scratch)
            sums.add(fold(q, self.run.K), self.k[keys], self.v[keys], scale=self.run.course.scale)
            totals[batch, :, rows] = sums.end(into[batch, :, rows])[1]

    def backward(self, dfound: Tensor, found: Tensor, lse: Tensor, dqueries: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Gradients of queries, keys [B, K, m, D] and values, into their places."""
        run, K = self.run, self.run.K
        grad, dq = self.mine(dfound), self.mine(dqueries)
        delta = (grad * self.mine(found)).sum(-1, keepdim=True).neg_()
        shift = lse[self.place] * -LOG2E
        dkeys, dvalues = (run.scratch(name, tuple(self.k.shape), grad) for name in ("dk", "dv"))
        for batch, keys, rows, fresh in self.pieces():
            asked = Asked(*(fold(x[batch, :, rows], K) for x in (grad, self.q, delta, shift)))
            dquery = run.scratch("dq", tuple(asked.q.shape), grad).zero_()
            partial_backward(
                asked, self.k[keys], self.v[keys], scale=run.course.scale, into=(dquery, dkeys[keys], dvalues[keys]),
                scratch=run.scratch, fresh=fresh,
            )  # fmt: skip
            dq[batch, :, rows] = dquery.view(dq[batch, :, rows].shape)
        dk.copy_(dkeys.view(dk.shape))
        dv.copy_(dvalues.view(dv.shape))


class _Back:
    """What gradients come together on the way back."""

    def __init__(self, run: _Run, vectors: Tensor, kv: Tensor, grads: tuple[Any, ...]):
        """`grads`: of keys and values of all states, and of their vectors, where they were asked for."""
        self.run, self.vectors, self.grads = run, vectors, grads
        sums: list[Any] = [None if x is None else torch.zeros_like(x) for x in run.weights]
        self.sums = Weights(*sums)
        widths = vectors.shape[-1], kv.shape[-1], 2 * run.H * run.D
        self.to_first = tuple(vectors.new_zeros(run.first, run.S, width) for width in widths)

    def hand(self, turn: int, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """What the states before a turn get of it: the first ones now; returned is what the turn before has left."""
        run, numbers = self.run, self.run.course.before[:, turn]
        first = numbers < run.first
        if not first.any():
            return grads
        rows, places = (tensor_of(x, grads[0].device) for x in (np.flatnonzero(first), numbers[first]))
        for into, grad in zip(self.to_first, grads):
            into.index_put_((places,), grad[rows], accumulate=True)  # in a fixed order
        if first.all():
            return None
        return tuple(grad.index_fill(0, rows, 0) for grad in grads)

    def through_projections(self, states: slice, handed: tuple[Tensor, ...] | None) -> Float[Tensor, "n S E"]:
        """The gradient of these states' vectors: of their projections, and what else was handed back to them."""
        w, sums = self.run.weights, self.sums
        dkeys, dvalues, *dvectors = (x[states] for x in self.grads if x is not None)
        dkv = torch.stack([dkeys, dvalues], 2).flatten(2)
        seen, mean, deviation = self.run.seen(self.vectors[states])
        if handed is not None:
            dkv.add_(handed[1])
        dseen = _product(dkv, seen, w.keys, sums.keys, sums.keys_bias)
        if handed is not None:
            dseen.add_(_product(handed[2], seen, w.queries, sums.queries, sums.queries_bias))
        sums.identity.add_(dseen.sum(0))
        grad: Tensor = torch.ops.aten.native_layer_norm_backward(
            dseen, self.vectors[states], dseen.shape[-1:], mean, deviation, None, None, [True, False, False]
        )[0]
        for more in (*dvectors, *([] if handed is None else handed[:1])):
            grad = grad.add_(more)
        return grad

    def through_gate(self, grad: Tensor, before: Tensor, left: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Of what a turn leaves: gradients of the vectors before it, and of what it found."""
        w, sums = self.run.weights, self.sums
        if w.keep is not None and sums.keep is not None:
            kept = w.keep.sigmoid()
            # before - left = (1 - g) · (before - z): z itself is not needed
            sums.keep.add_((grad * (before - left)).sum((0, 1)).mul_(kept))
            dbefore, draw = grad * kept, grad * (1 - kept)
        else:
            with torch.enable_grad():
                old, raw = (x.detach().requires_grad_() for x in (before, self.run.raw(found)))
                dbefore, draw = torch.autograd.grad(renewed(old, raw, None), (old, raw), grad)
        return dbefore, _product(draw, found, w.out, sums.out, sums.out_bias)


def renewed(before: Tensor, raw: Tensor, keep: Tensor | None) -> Float[Tensor, "B S E"]:
    """Through the gate."""
    if keep is not None:
        return torch.lerp(raw, before, keep.sigmoid())
    new, forget, enter = raw.chunk(3, -1)
    return before * (forget + 1).sigmoid() + new.tanh() * (enter - 1).sigmoid()


def _product(grad: Tensor, x: Tensor, weight: Tensor, dweight: Tensor, dbias: Tensor | None) -> Tensor:
    """The gradient of x in x · weightᵀ + bias; those of weight and bias are added to their sums."""
    flat = grad.flatten(0, 1)
    dweight.addmm_(flat.T, x.flatten(0, 1))
    if dbias is not None:
        dbias.add_(flat.sum(0))
    return (flat @ weight).view(*grad.shape[:2], -1)
