"""One turn of a recurrence over blocks: what is projected, looked at and renewed, for all lanes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.host import tensor_of
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import Scratch
from attention_zoo.ops.softmax.tiles import scores_at_once

EPS = 1e-5
"""Of the norm, added to the variance."""
ROWS = 512
"""Vectors whose gradients are held at once on the way back: enough for one product of a weight's gradient."""


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


class Run:
    """One recurrence: n blocks in G turns, in which S vectors of E features with H heads meet K heads of keys.

    States stand one after the other, by their numbers.
    """

    def __init__(self, first: Tensor, k: Tensor, v: Tensor, weights: Weights, course: Course):
        self.weights, self.course, self.first = weights, course, len(first)
        self.k, self.v = k.to(first.dtype), v.to(first.dtype)
        (self.n, self.K, self.W, self.D), self.S = k.shape, len(weights.identity)
        self.G, self.KV = len(course.counts), 2 * self.K * self.D
        self.H = (len(weights.into) - self.KV) // (2 * self.D)
        self.ends, self.counts = course.counts.cumsum().tolist(), course.counts.tolist()
        self.scratch = Scratch()
        self._views: dict[str, dict[tuple[int, ...], tuple[Tensor, Any]]] = {}
        # views of all turns at once, since a turn's own would each be an operator
        self.keys, self.values = self.by_blocks(self.k), self.by_blocks(self.v)

    def by_states(self, x: Float[Tensor, "N *rest"], dim: int = 0) -> tuple[Tensor, ...]:
        """Views of what is there first, and of what each turn leaves; states stand in this dimension."""
        return x.split([self.first, *self.counts], dim)

    def by_blocks(self, x: Float[Tensor, "n *rest"], each: int = 1) -> tuple[Tensor, ...]:
        """Views of what each turn goes through, of so many rows a block."""
        return x.split([each * count for count in self.counts])

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

    def windows(self) -> list[slice]:
        """The numbers of successive turns' states, of at most `ROWS` vectors or one turn; the first window is first."""
        borders = [self.first + self.n]
        for turn in reversed(range(-1, self.G)):
            states = self.left(turn)
            if states.stop < borders[-1] and (borders[-1] - states.start) * self.S > ROWS:
                borders.append(states.stop)
        borders.append(0)
        return [slice(low, high) for high, low in pairwise(borders)][::-1]

    @cached_property
    def begun(self) -> Int[np.ndarray, " n"]:
        """The state that each block begins with."""
        followed = [
            self.first + np.arange(count) + self.blocks(turn).start for turn, count in enumerate(self.course.counts[1:])
        ]
        return np.concatenate([self.course.start, *followed])

    def chosen(self, left: Float[Tensor, "..."], turn: int, dim: int = 0) -> Float[Tensor, "..."]:
        """Of what is there before a turn, what its lanes begin with; states stand in this dimension."""
        if turn:
            return left if left.shape[dim] == self.counts[turn] else left.narrow(dim, 0, self.counts[turn])
        return left.index_select(dim, tensor_of(self.course.start, left.device))

    def by_heads(self, x: Float[Tensor, "b S Q"]) -> Float[Tensor, "2 b H S D"]:
        return x.unflatten(-1, (2, -1, self.D)).permute(2, 0, 3, 1, 4)

    def kinds(self, x: Float[Tensor, "2 b H S d"]) -> tuple[Tensor, ...]:
        """Of each kind the rows that share a key head, [bK, gS, d]: views of a contiguous tensor."""
        return x.view(2, x.shape[1] * self.K, -1, x.shape[4]).unbind()

    def room_by_kinds(self, name: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A piece of the scratch [2, b, H, S, D], and its `kinds`."""
        whole = self.scratch(name, shape, like)
        return whole, self._viewed(name, whole, self.kinds)

    def room_turned(self, name: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """A piece of the scratch [h, l, m], and its transpose."""
        whole = self.scratch(name, shape, like)
        return whole, self._viewed(name, whole, lambda x: x.transpose(1, 2))

    def _viewed(self, name: str, whole: Tensor, view: Callable[[Tensor], Any]) -> Any:
        """Views of a piece of the scratch, made once for as long as turns are alike."""
        held, shape = self._views.setdefault(name, {}), tuple(whole.shape)
        if shape not in held or held[shape][0] is not whole:
            held[shape] = whole, view(whole)
            for other, (piece, _) in list(held.items()):  # of memory that has become too small: it is to be free
                if piece.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                    del held[other]
        return held[shape][1]

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
        self, queries: Float[Tensor, "2 b H S D"], own: Float[Tensor, "2 b K S D"], turn: int
    ) -> tuple[Look, Look]:
        """At the vectors themselves, of which keys and values are given, and at the turn's blocks."""
        to_own, to_blocks = self.kinds(queries)
        blocks = (x[turn].flatten(0, 1) for x in (self.keys, self.values))
        return Look(self, to_own, *own.flatten(1, 2).unbind()), Look(self, to_blocks, *blocks)


class Look:
    """Attention of a turn's queries of one kind, `Run.kinds`, to all of some keys [bK, m, D].

    Query heads of one key head are rows of one product; whole rows of scores at once.
    """

    def __init__(self, run: Run, queries: Tensor, k: Tensor, v: Tensor):
        self.run, self.q, self.k, self.v = run, queries, k, v

    def pieces(self) -> Iterator[tuple[slice | None, slice | None, bool]]:
        """Key heads, and queries of one step, None: all; whether it is the first to see these keys."""
        heads, queries, _ = self.q.shape
        limit = scores_at_once(self.q) // self.k.shape[1]
        some, rows = max(1, limit // queries), min(queries, max(1, limit))
        for head in range(0, heads, some):
            for at in range(0, queries, rows):
                of_heads = None if some >= heads else slice(head, head + some)
                yield of_heads, None if rows == queries else slice(at, at + rows), not at

    def weights(self, q: Float[Tensor, "h l D"], k: Float[Tensor, "h m D"]) -> tuple[Tensor, Tensor]:
        """Those of the softmax [h, l, m], in the scratch, and their transpose."""
        shape = *q.shape[:2], k.shape[1]
        scores, (weights, turned) = self.run.scratch("scores", shape, q), self.run.room_turned("weights", shape, q)
        scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=self.run.course.scale)
        return torch.softmax(scores, -1, out=weights), turned

    def forward(self, into: Float[Tensor, "bK gS D"]) -> None:
        for heads, rows, _ in self.pieces():
            q, k, v = _cut(self.q, heads, rows), _cut(self.k, heads), _cut(self.v, heads)
            _cut(into, heads, rows).baddbmm_(self.weights(q, k)[0], v, beta=0)

    def backward(
        self,
        grad: Float[Tensor, "bK gS D"],
        gap: Float[Tensor, "bK gS 1"],
        dq: Float[Tensor, "bK gS D"],
        dk: Float[Tensor, "bK m D"],
        dv: Float[Tensor, "bK m D"],
    ) -> None:
        """Gradients of queries, keys and values, into their places."""
        scale = self.run.course.scale
        for heads, rows, fresh in self.pieces():
            q, dout, beta = _cut(self.q, heads, rows), _cut(grad, heads, rows), 0 if fresh else 1
            k, v = _cut(self.k, heads), _cut(self.v, heads)
            weights, turned = self.weights(q, k)
            _cut(dv, heads).baddbmm_(turned, dout, beta=beta)
            dscores, turned = self.run.room_turned("scores", tuple(weights.shape), q)
            dscores.copy_(_cut(gap, heads, rows)).baddbmm_(dout, v.transpose(1, 2)).mul_(weights)
            _cut(dq, heads, rows).baddbmm_(dscores, k, beta=0, alpha=scale)
            _cut(dk, heads).baddbmm_(turned, q, beta=beta, alpha=scale)


def _cut(x: Tensor, heads: slice | None, rows: slice | None = None) -> Tensor:
    """Some heads, and of these some rows; itself where it is all of them."""
    x = x if heads is None else x[heads]
    return x if rows is None else x[:, rows]


def renewed(
    before: Float[Tensor, "b S E"], raw: Float[Tensor, "b S R"], gate: Tensor | None, into: Tensor | None = None
) -> Float[Tensor, "b S E"]:
    """Through the gate: a fixed one that keeps so much, or an LSTM's; into a place, where one is given."""
    if gate is not None:
        return torch.lerp(raw, before, gate, out=into)
    new, forget, enter = raw.chunk(3, -1)
    left = before * (forget + 1).sigmoid() + new.tanh() * (enter - 1).sigmoid()
    return left if into is None else into.copy_(left)
