"""A recurrence over blocks of tokens: vectors that look at themselves and at a block, and are renewed through a gate.

    seen  = norm(c) + identity                            K, V, q, q_x: heads of seen
    found = [softmax(q Kᵀ) V ; softmax(q_x K_xᵀ) V_x]     x: the tokens of the block, whose keys and values are given
    z     = W found + b
    fixed gate   c <- c ⊙ g + z ⊙ (1 - g),   g = sigmoid(keep)
    LSTM gate    c <- c ⊙ sigmoid(f + 1) + tanh(z) ⊙ sigmoid(i - 1),   [z; f; i] = W found + b

Hutchins et al. 2022, §3. Turns wait for one another, so each is a few large operations, for all lanes at once; one
product gives keys, values and queries of what the turn before has left. Of each block the vectors, their keys and
values and what they found are kept; what is cheaper to compute again than to keep (normalised vectors, queries, scores)
is computed again in backward, where gradients of weights are products over all blocks, made once at the end.
O(n·S·E) memory for n blocks.
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
from attention_zoo.ops.softmax.partial import Scratch
from attention_zoo.ops.softmax.tiles import scores_at_once

EPS = 1e-5
"""Of the norm, added to the variance."""


class Weights(NamedTuple):
    """What vectors are projected and renewed by, in their precision. F is 2·K·D + 2·H·D, Q is 2·H·D.

    Fields:
        identity: added to the normalised vectors.
        into, into_bias: into K heads of keys, of values, and H heads of queries to the vectors themselves, to tokens.
        out, out_bias: of what was found: E features for a fixed gate, 3·E (z, f, i) for an LSTM's.
        keep: of a fixed gate; None: the gate is an LSTM's.
    """

    identity: Float[Tensor, "S E"]
    into: Float[Tensor, "F E"]
    into_bias: Float[Tensor, " F"] | None
    out: Float[Tensor, "R Q"]
    out_bias: Float[Tensor, " R"] | None
    keep: Float[Tensor, " E"] | None


class Course(NamedTuple):
    """How states follow each other, by their numbers (`layout.blocks.Turns`).

    Fields:
        counts: how many blocks each turn goes through: those of the first lanes.
        start: the state that each lane begins with.
        stops: whether no gradient goes back to the vectors that a block leaves; None: nowhere.
        scale: factor on scores.
        keeps: whether the vectors are asked for.
    """

    counts: Int[np.ndarray, " G"]
    start: Int[np.ndarray, " lanes"]
    stops: Bool[np.ndarray, " n"] | None
    scale: float
    keeps: bool


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
    return _Recur.apply(first, k, v, course, *weights)


class _Recur(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, first: Tensor, k: Tensor, v: Tensor, course: Course, *weights: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        run = _Run(first, k, v, Weights(*weights), course)
        vectors, kv, found = run.room(first)
        vectors[: len(first)] = first
        gate = run.gate()
        for turn, count in enumerate([*course.counts, 0]):
            states = run.left(turn - 1)
            projected = run.project(run.seen(vectors[states])[0], None if count else slice(run.KV))
            kv[:, states] = run.by_heads(projected[..., : run.KV])
            if not count:
                break
            before, keys, values = (run.before(x, turn) for x in (vectors, *kv))
            queries = run.by_heads(run.chosen(projected, turn)[..., run.KV :]).contiguous()
            blocks = run.blocks(turn)
            looked = run.scratch("found", tuple(queries.shape), queries)
            for look in run.looks(queries, (keys, values), blocks):
                look.forward(looked)
            run.by_heads(found[blocks]).copy_(looked)
            renewed(before, run.raw(found[blocks]), gate, into=vectors[run.left(turn)])
        ctx.save_for_backward(k, v, vectors, kv, found, *weights)
        ctx.course, ctx.first = course, len(first)
        keys, values = kv.transpose(2, 3).unbind(0)
        return keys, values, vectors if course.keeps else None

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> tuple[Tensor | None, ...]:
        k, v, vectors, kv, found, *weights = saved
        run = _Run(vectors[: ctx.first], k, v, Weights(*weights), ctx.course)
        back = _Back(run, vectors, found, grads)
        dkeys, dvalues = (large_pages(vectors.new_empty(x.shape)) for x in (k, v))
        for turn in reversed(range(run.G)):
            blocks = run.blocks(turn)
            back.through_projections(turn + 1)
            before, keys, values = (run.before(x, turn) for x in (vectors, *kv))
            dfound, delta = back.through_gate(turn, before)
            queries = run.by_heads(run.project(run.before(back.seen, turn), slice(run.KV, None))).contiguous()
            dqueries = run.scratch("dqueries", tuple(queries.shape), queries)
            down = run.scratch("dkv", (2, *keys.shape), queries)
            own, block = run.looks(queries, (keys, values), blocks)
            own.backward(dfound, delta, dqueries, *down)
            block.backward(dfound, delta, dqueries, dkeys[blocks], dvalues[blocks])
            back.hand(turn, down, dqueries)
        back.through_projections(0)
        return back.dvectors[: ctx.first], dkeys.to(k.dtype), dvalues.to(v.dtype), None, *back.weights()


class _Run:
    """One recurrence: n blocks in G turns, in which S vectors of E features with H heads meet K heads of keys.

    States stand one after the other, by their numbers.
    """

    def __init__(self, first: Tensor, k: Tensor, v: Tensor, weights: Weights, course: Course):
        self.weights, self.course, self.first = weights, course, len(first)
        self.k, self.v = k.to(first.dtype), v.to(first.dtype)
        (self.n, self.K, self.W, self.D), self.S = k.shape, len(weights.identity)
        self.G, self.KV = len(course.counts), 2 * self.K * self.D
        self.H = (len(weights.into) - self.KV) // (2 * self.D)
        self.ends = course.counts.cumsum().tolist()
        self.scratch = Scratch()

    def room(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For vectors [N, S, E], keys and values [2, N, K, S, D], and what blocks find [n, S, Q]."""
        N = self.first + self.n
        sizes = (N, *like.shape[1:]), (2, N, self.K, self.S, self.D), (self.n, self.S, 2 * self.H * self.D)
        vectors, kv, found = (large_pages(like.new_empty(size)) for size in sizes)
        return vectors, kv, found

    def blocks(self, turn: int) -> slice:
        """The numbers of a turn's blocks."""
        return slice(self.ends[turn] - int(self.course.counts[turn]), self.ends[turn])

    def left(self, turn: int) -> slice:
        """The numbers of what a turn leaves; -1: of what is there first."""
        if turn < 0:
            return slice(0, self.first)
        blocks = self.blocks(turn)
        return slice(self.first + blocks.start, self.first + blocks.stop)

    def chosen(self, left: Float[Tensor, "b *rest"], turn: int) -> Float[Tensor, "c *rest"]:
        """Of what is there before a turn, what its lanes begin with."""
        if turn:
            return left[: self.course.counts[turn]]
        return left.index_select(0, tensor_of(self.course.start, left.device))

    def before(self, states: Float[Tensor, "N *rest"], turn: int) -> Float[Tensor, "c *rest"]:
        """Those that a turn begins with."""
        return self.chosen(states[self.left(turn - 1)], turn)

    def by_heads(self, x: Float[Tensor, "b S Q"]) -> Float[Tensor, "2 b H S D"]:
        return x.unflatten(-1, (2, -1, self.D)).permute(2, 0, 3, 1, 4)

    def seen(self, vectors: Float[Tensor, "b S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors as projections see them; and mean and deviation of each, for backward."""
        normal, mean, deviation = torch.native_layer_norm(vectors, vectors.shape[-1:], None, None, EPS)
        return normal.add_(self.weights.identity), mean, deviation

    def project(self, seen: Float[Tensor, "b S E"], some: slice | None = None) -> Float[Tensor, "b S f"]:
        """Into keys, values and queries, or some of these."""
        _, into, bias, *_ = self.weights
        if some is not None:
            into, bias = into[some], None if bias is None else bias[some]
        return F.linear(seen, into, bias)

    def raw(self, found: Float[Tensor, "b S Q"]) -> Float[Tensor, "b S R"]:
        return F.linear(found, self.weights.out, self.weights.out_bias)

    def gate(self) -> Float[Tensor, " E"] | None:
        """The share of the old that a fixed gate keeps."""
        return None if self.weights.keep is None else self.weights.keep.sigmoid()

    def looks(
        self, queries: Float[Tensor, "2 b H S D"], own: tuple[Tensor, Tensor], blocks: slice
    ) -> tuple[_Look, _Look]:
        """At the vectors themselves, and at the block."""
        return _Look(self, 0, queries, *own), _Look(self, 1, queries, self.k[blocks], self.v[blocks])


class _Look:
    """Attention of a turn's queries [2, b, H, S, D], of one of the two kinds, to all of some keys [b, K, m, D].

    Query heads of one key head are rows of one product; whole rows of scores at once.
    """

    def __init__(self, run: _Run, kind: int, queries: Tensor, k: Tensor, v: Tensor):
        self.run, self.kind = run, kind
        self.q, self.k, self.v = self.rows(queries), k.flatten(0, 1), v.flatten(0, 1)

    def rows(self, x: Float[Tensor, "2 b H S d"]) -> Float[Tensor, "bK gS d"]:
        """A view of a contiguous tensor."""
        return x[self.kind].view(x.shape[1] * self.run.K, -1, x.shape[-1])

    def pieces(self) -> Iterator[tuple[slice, slice, bool]]:
        """Key heads, and queries of one step; whether it is the first to see these keys."""
        heads, queries, _ = self.q.shape
        limit = scores_at_once(self.q) // self.k.shape[1]
        some, rows = max(1, limit // queries), min(queries, max(1, limit))
        for head in range(0, heads, some):
            for at in range(0, queries, rows):
                yield slice(head, head + some), slice(at, at + rows), not at

    def weights(self, q: Float[Tensor, "h l D"], heads: slice) -> Float[Tensor, "h l m"]:
        """Those of the softmax, in the scratch."""
        k = self.k[heads]
        scores, weights = (self.run.scratch(name, (*q.shape[:2], k.shape[1]), q) for name in ("scores", "weights"))
        scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=self.run.course.scale)
        return torch.softmax(scores, -1, out=weights)

    def forward(self, found: Float[Tensor, "2 b H S D"]) -> None:
        into = self.rows(found)
        for heads, queries, _ in self.pieces():
            into[heads, queries].baddbmm_(self.weights(self.q[heads, queries], heads), self.v[heads], beta=0)

    def backward(
        self,
        dfound: Tensor,
        delta: Tensor,
        dqueries: Tensor,
        dk: Float[Tensor, "b K m D"],
        dv: Float[Tensor, "b K m D"],
    ) -> None:
        """Gradients of queries, keys and values, into their places."""
        grad, gap, dq, scale = self.rows(dfound), self.rows(delta), self.rows(dqueries), self.run.course.scale
        dk, dv = dk.flatten(0, 1), dv.flatten(0, 1)
        for heads, queries, fresh in self.pieces():
            q, dout, beta = self.q[heads, queries], grad[heads, queries], 0 if fresh else 1
            weights = self.weights(q, heads)
            dv[heads].baddbmm_(weights.transpose(1, 2), dout, beta=beta)
            dscores = self.run.scratch("scores", tuple(weights.shape), q).copy_(gap[heads, queries])
            dscores.baddbmm_(dout, self.v[heads].transpose(1, 2)).mul_(weights)
            dq[heads, queries].baddbmm_(dscores, self.k[heads], beta=0, alpha=scale)
            dk[heads].baddbmm_(dscores.transpose(1, 2), q, beta=beta, alpha=scale)


class _Back:
    """What gradients come together on the way back.

    Attributes:
        seen: [N, S, E], all vectors as projections saw them.
        dvectors: [N, S, E], of the vectors of each state.
        dprojected: [N, S, F], of what each state was projected to.
        draw: [n, S, R], of what was projected out of heads.
    """

    def __init__(self, run: _Run, vectors: Tensor, found: Tensor, grads: tuple[Any, ...]):
        """`grads`: of keys and values of all states, and of their vectors, where they were asked for."""
        self.run, self.vectors, self.found, self.gate = run, vectors, found, run.gate()
        dkeys, dvalues, dvectors = grads
        self.seen, self.mean, self.deviation = run.seen(vectors)
        self.dvectors = torch.zeros_like(vectors) if dvectors is None else dvectors.clone()
        self.dprojected = large_pages(vectors.new_zeros(*vectors.shape[:2], len(run.weights.into)))
        into = self.dprojected[..., : run.KV].unflatten(-1, (2, run.K, run.D))
        into[:, :, 0], into[:, :, 1] = dkeys, dvalues
        self.draw = large_pages(vectors.new_empty(*found.shape[:2], len(run.weights.out)))

    def through_projections(self, turn: int) -> None:
        """Of the vectors before a turn: what comes through their projections is added to the rest."""
        states, width = self.run.left(turn - 1), self.run.KV if turn == self.run.G else None
        dseen = self.dprojected[states, :, :width] @ self.run.weights.into[:width]
        vectors, mean, deviation = self.vectors[states], self.mean[states], self.deviation[states]
        more = torch.ops.aten.native_layer_norm_backward(
            dseen, vectors, vectors.shape[-1:], mean, deviation, None, None, [True, False, False]
        )[0]
        self.dvectors[states] += more

    def through_gate(self, turn: int, before: Float[Tensor, "c S E"]) -> tuple[Tensor, Tensor]:
        """Of what a turn found, [2, c, H, S, D], and its sums with that, negative, [2, c, H, S, 1]."""
        run, blocks = self.run, self.run.blocks(turn)
        grad, found, stops = self.dvectors[run.left(turn)], self.found[blocks], run.course.stops
        if stops is not None and stops[blocks].any():
            grad.masked_fill_(tensor_of(stops[blocks], grad.device)[:, None, None], 0)
        if self.gate is not None:
            draw = torch.mul(grad, 1 - self.gate, out=self.draw[blocks])
            old = grad * self.gate
        else:
            with torch.enable_grad():
                held, raw = (x.detach().requires_grad_() for x in (before, run.raw(found)))
                old, draw = torch.autograd.grad(renewed(held, raw, None), (held, raw), grad)
            self.draw[blocks] = draw
        self._add(self.dvectors, turn, old)
        dfound = draw @ run.weights.out
        delta = (dfound * found).unflatten(-1, (2, -1, run.D)).sum(-1, keepdim=True).neg_()
        return run.by_heads(dfound).contiguous(), delta.permute(2, 0, 3, 1, 4).contiguous()

    def hand(self, turn: int, down: Float[Tensor, "2 c K S D"], dqueries: Float[Tensor, "2 c H S D"]) -> None:
        """What the states before a turn get of it."""
        both = [x.permute(1, 3, 0, 2, 4).flatten(2) for x in (down, dqueries)]
        self._add(self.dprojected, turn, torch.cat(both, -1))

    def _add(self, into: Float[Tensor, "N S f"], turn: int, grad: Float[Tensor, "c S f"]) -> None:
        """To the states that a turn began with."""
        run = self.run
        states = into[run.left(turn - 1)]
        if turn:
            states[: len(grad)] += grad
        else:
            states.index_put_((tensor_of(run.course.start, grad.device),), grad, accumulate=True)  # in a fixed order

    def weights(self) -> Weights:
        """Gradients of the weights: products over all states, and over all blocks."""
        w, dprojected, draw = self.run.weights, self.dprojected.flatten(0, 1), self.draw.flatten(0, 1)
        return Weights(
            self.dprojected.sum(0) @ w.into,
            dprojected.T @ self.seen.flatten(0, 1),
            None if w.into_bias is None else dprojected.sum(0),
            draw.T @ self.found.flatten(0, 1),
            None if w.out_bias is None else draw.sum(0),
            None if self.gate is None else self._of_keep(self.gate),
        )

    def _of_keep(self, gate: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
        run, first = self.run, self.run.first
        followed = [
            first + np.arange(count) + run.blocks(turn).start for turn, count in enumerate(run.course.counts[1:])
        ]
        numbers = tensor_of(np.concatenate([run.course.start, *followed]), gate.device)
        # before - left = (1 - g) · (before - z): z itself is not needed
        apart = self.vectors.index_select(0, numbers).sub_(self.vectors[first:])
        return apart.mul_(self.dvectors[first:]).sum((0, 1)).mul_(gate)


def renewed(
    before: Float[Tensor, "b S E"], raw: Float[Tensor, "b S R"], gate: Tensor | None, into: Tensor | None = None
) -> Float[Tensor, "b S E"]:
    """Through the gate: a fixed one that keeps so much, or an LSTM's; into a place, where one is given."""
    if gate is not None:
        return torch.lerp(raw, before, gate, out=into)
    new, forget, enter = raw.chunk(3, -1)
    left = before * (forget + 1).sigmoid() + new.tanh() * (enter - 1).sigmoid()
    return left if into is None else into.copy_(left)
