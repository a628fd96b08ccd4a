"""Attention of hashed tokens: sort, attend inside chunks, merge rounds (Kitaev et al. 2020, §2).

Tokens are sorted by (document, bucket, place) and cut into chunks; a chunk attends to itself and to its neighbours.

Everything works on a *ragged* list of M tokens: the valid tokens of all rows, document after document. Padding is gone
before this file is entered, and each document has its own chunks, so that neither can move anything.

Attention over several rounds, merged by log-sum-exp, is one softmax over the union of the rounds' keys, where a key met
n times counts n times. Hence backward runs each chunk with the merged statistics (ops/softmax/partial.py) and the
rounds' and chunks' gradients add: nothing but output, log-sum-exp and the sorted order (int32) is saved. Chunks are
processed a few at a time, heads in blocks: O(M·D) memory beside the inputs, O(rounds·M·(log M + window·D)) time. A
document fills whole chunks, so that rows packed with documents much shorter than a chunk pay for empty slots.

Letters: M tokens, H heads, R rounds, D head width, N chunks in a round, C slots in a chunk, W chunks in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from attention_zoo.layout.host import Array, array_of, on_host, tensor_of
from attention_zoo.ops.lsh.arcs import Arcs, arcs_of, each, has_arcs, times_met
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, partial, partial_backward

# What one step may hold: scores of the chunks attended at once, and slots of the heads handled at once. On CPU a step
# should stay near the cache; on a GPU a few steps should fill the device (these two are not measured).
_SCORES = {"cpu": 2**19}
_SLOTS = {"cpu": 2**16}
_SCORES_GPU, _SLOTS_GPU = 2**23, 2**18
_ROUNDS = {"cpu": 1}
_ROUNDS_GPU = 8
"""In so many rounds at once pairs are looked for, a byte each: on a GPU operators cost, on a CPU memory."""


def scores_at_once(device: torch.device) -> int:
    return _SCORES.get(device.type, _SCORES_GPU)


def lsh_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan) -> Float[Tensor, "m H D"]:
    """Attention of tokens to those that share a window of sorted chunks with them; keys are normalised queries.

    A token attends to itself only where it sees nothing else in any round; then its output is its value. Linear memory,
    backward recomputes.
    """
    out: Tensor = _Chunks.apply(q, v, plan.sorted())
    return out


class HeadBlock:
    """The chunks of a few heads: rows are (head, token), chunks (head, round, chunk), slots (head, round, chunk, slot).

    Within a document a row's number grows with time; the number `rows` stands for an empty slot. Behind all chunks is
    an empty one, for those that a window does not have.
    """

    def __init__(self, plan: HashedPlan, heads: slice):
        self.plan, self.heads = plan, heads
        layout = plan.layout
        assert plan.order is not None
        order = plan.order[heads].long()
        self.H, R, M = order.shape
        device = order.device
        self.rows, self.M = self.H * M, M
        per_round = layout.neighbours.shape[0] // R * layout.chunk
        head = torch.arange(self.H, device=device)[:, None, None]
        first = (head * R + torch.arange(R, device=device)[:, None]) * per_round
        chunks = self.H * layout.neighbours.shape[0]
        self.contents = torch.full((chunks + 1, layout.chunk), self.rows, device=device)
        self.contents[:-1].view(self.H, R, per_round)[..., layout.slot] = order + head * M
        self.slots = torch.empty_like(order).scatter_(-1, order, layout.slot.expand_as(order)) + first  # [H, R, M]
        windows = layout.neighbours + head * layout.neighbours.shape[0]
        self.windows = windows.masked_fill_(~layout.present, chunks).flatten(0, 1)
        if plan.asked is None:
            self.active, self.asked_slots = torch.arange(chunks, device=device), self.slots
        else:
            asked = self.slots[..., plan.asked]
            self.active, index = torch.unique(asked // layout.chunk, return_inverse=True)
            self.asked_slots = index * layout.chunk + asked % layout.chunk
        self.labels: Tensor | None = None
        if plan.inside and plan.buckets is not None:
            # numbered through the rounds: buckets of two rounds are never the same
            labels = plan.buckets[heads] + torch.arange(R, device=device)[:, None] * (plan.buckets.amax() + 1)
            self.labels = labels.new_full(self.contents.shape, -1)
            self.labels.view(-1)[self.slots.flatten()] = labels.flatten()

    def table(self, *parts: Float[Tensor, "_ H D"], dtype: torch.dtype) -> Float[Tensor, "rows_and_one parts_D"]:
        """Vectors of the rows, side by side so that one gather fetches all; zeros for the empty slot.

        Parts hold the block's heads, and all tokens or the asked ones (the others are zeros).
        """
        D = parts[0].shape[-1]
        table = large_pages(torch.empty(self.rows + 1, len(parts), D, dtype=dtype, device=parts[0].device))
        table[self.rows if self.plan.asked is None else slice(None)] = 0
        rows = table[: self.rows].view(self.H, self.M, len(parts), D)
        for number, part in enumerate(parts):
            if len(part) == self.M:
                rows[:, :, number] = part.transpose(0, 1)
            else:
                rows[:, self.plan.asked, number] = part.transpose(0, 1).to(dtype)
        return table.flatten(1)

    def scalars(self, x: Float[Tensor, "asked H"], fill: float) -> Float[Tensor, " rows_and_one"]:
        """One number a row, `fill` for the empty slot and the rows that were not asked."""
        table = x.new_full((self.rows + 1,), fill)
        asked = slice(None) if self.plan.asked is None else self.plan.asked
        table[: self.rows].view(self.H, -1)[:, asked] = x.T
        return table

    def steps(self, exact: torch.dtype, width: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """A few chunks at a time: which of the active ones, query rows, chunks of the windows, key rows, bias.

        Args:
            width: of what is gathered of a key.
        """
        C, W = self.plan.layout.chunk, self.windows.shape[1]
        size = max(1, scores_at_once(self.contents.device) // (C * W * max(C, width)))
        for start in range(0, len(self.active), size):
            step = slice(start, min(start + size, len(self.active)))
            chunks = self.active[step]
            queries, windows = self.contents[chunks], self.windows[chunks]
            keys = self.contents[windows].flatten(1)
            yield step, queries, windows, keys, self.bias(chunks, windows, queries, keys, exact)

    def bias(
        self, chunks: Tensor, windows: Tensor, queries: Tensor, keys: Tensor, exact: torch.dtype
    ) -> Float[Tensor, "a 1 C K"]:
        """-inf for the future, empty slots, other buckets and the token itself; else 0, or -log of the times met."""
        # by arithmetic: to compare integers costs half as much as the attention itself; floats are exact this far
        dtype = torch.float32 if self.rows < 2**24 else torch.float64
        q, k = queries.to(dtype)[:, :, None], keys.to(dtype)[:, None, :]
        if self.plan.causal:
            bias = (q - k).sub_(1).clamp_(-1, 0)
        else:
            bias = (q - k).abs_().clamp_(max=1).sub_(1).sub_((keys == self.rows).to(dtype)[:, None])
        if self.labels is not None:
            mine, theirs = self.labels[chunks], self.labels[windows].flatten(1)
            bias.sub_((mine[:, :, None] != theirs[:, None, :]).to(dtype))
        bias.mul_(torch.finfo(dtype).max).mul_(2)  # what is negative becomes -inf, 0 stays 0
        if self.plan.once:
            bias = bias - self.times_shown(queries, keys).clamp_(min=1).to(exact).log_()
        return bias[:, None]

    def times_shown(self, queries: Int[Tensor, "a C"], keys: Int[Tensor, "a K"]) -> Integer[Tensor, "a C K"]:
        """As `times_met`, by arcs where windows show such: on a CPU, where numpy is."""
        if not on_host(queries.device) or not has_arcs(self.plan):
            return self.times_met(queries, keys)
        cell, seen = self.arcs
        shown = each(seen, lambda x: x[:, array_of(queries)])
        return tensor_of(times_met(cell[:, array_of(keys)], shown), queries.device)

    @cached_property
    def arcs(self) -> Arcs:
        """[R, rows and one]; of the empty slot anything."""
        some = self.plan._replace(
            order=None if self.plan.order is None else self.plan.order[self.heads],
            buckets=None if self.plan.buckets is None else self.plan.buckets[self.heads],
        )
        cell, seen = arcs_of(some)

        def flat(x: Array) -> Array:
            return np.concatenate([x.reshape(len(x), -1), x[:, 0, :1]], 1)

        return Arcs(flat(cell), each(seen, flat))

    def times_met(self, queries: Int[Tensor, "a C"], keys: Int[Tensor, "a K"]) -> Integer[Tensor, "a C K"]:
        """How often windows of all rounds show each key to each query, before causality; anything of an empty slot."""
        pad, many = nn.functional.pad, _ROUNDS.get(queries.device.type, _ROUNDS_GPU)
        chunk_of = pad((self.slots // self.plan.layout.chunk).transpose(0, 1).flatten(1), (0, 1), value=-1)  # [R, rows]
        met = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.int32, device=queries.device)
        for shift in range(len(chunk_of)) if self.plan.layout.across_rounds else [0]:
            parts = [x.split(many) for x in (chunk_of, chunk_of.roll(shift, 0))]
            if self.labels is not None:
                name = pad(self.labels.view(-1)[self.slots].transpose(0, 1).flatten(1), (0, 1), value=-1)
                parts += [x.split(many) for x in (name, name.roll(shift, 0))]
            for mine, theirs, *names in zip(*parts):
                chunks, alike = theirs[:, keys][:, :, None], None
                if names:
                    alike = names[0][:, queries][..., None] == names[1][:, keys][:, :, None]
                for window in self.windows[mine[:, queries].clamp(min=0)].unbind(-1):
                    shown = chunks == window[..., None]
                    shown = shown if alike is None else shown & alike
                    met += shown[0] if len(shown) == 1 else shown.sum(0)
        return met

    # --- the block's share: vectors in are [tokens, its heads, D], out [its heads, tokens, D]

    def forward(self, q: Tensor, v: Tensor) -> tuple[Float[Tensor, "h m D"], Float[Tensor, "h m"]]:
        """Output and log-sum-exp of the asked tokens; zeros and -inf where one sees nothing."""
        k, _ = _keys(q, self.plan.epsilon)
        out, lse = self.attend(q, k, v)
        lse = lse.view(-1)[self.asked_slots]
        total = lse.logsumexp(1)
        weights = (lse - total.masked_fill(total == -torch.inf, 0)[:, None]).exp()
        return _sum_rounds(out.view(-1, q.shape[-1]), self.asked_slots, weights), total

    def backward(
        self, q: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Float[Tensor, "h M D"], Float[Tensor, "h M D"]]:
        """Gradients of q and v, but for tokens that see only themselves."""
        k, factor = _keys(q, self.plan.epsilon)
        asked = slice(None) if self.plan.asked is None else self.plan.asked
        dq_slots, dk_slots, dv_slots = self.attend_backward(q, k, v, grad, out, lse)
        dk, dv = (_sum_rounds(slots.view(-1, q.shape[-1]), self.slots) for slots in (dk_slots, dv_slots))
        k, factor = k.transpose(0, 1), factor.transpose(0, 1)
        dq = dk.sub_(k * (k * dk).sum(-1, keepdim=True)).mul_(factor)
        dq[:, asked] += _sum_rounds(dq_slots.view(-1, q.shape[-1]), self.asked_slots)
        return dq, dv

    # --- what the Triton kernels do in place of the steps: from rows to slots

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Float[Tensor, "active C D"], Float[Tensor, "active C"]]:
        """Output and log-sum-exp of the slots of the active chunks."""
        C, D = self.plan.layout.chunk, q.shape[-1]
        query_table, key_table = self.table(q, dtype=k.dtype), self.table(k, v, dtype=k.dtype)
        out = large_pages(k.new_empty(len(self.active), C, D))
        lse = k.new_empty(len(self.active), C)
        scratch = Scratch()
        for step, queries, _, keys, bias in self.steps(k.dtype, 2 * D):
            shown = _rows(key_table, keys, scratch, "shown").chunk(2, -1)
            rows, k, v = (x[:, None] for x in (_rows(query_table, queries, scratch, "asked"), *shown))
            part, part_lse = partial(rows, k, v, bias, scale=self.plan.scale, scratch=scratch)
            out[step], lse[step] = part[:, 0], part_lse[:, 0, :, 0]
        return out, lse

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the queries in the slots of the active chunks, of keys and values in all slots."""
        C, D = self.plan.layout.chunk, q.shape[-1]
        query_table, key_table = self.table(q, grad, dtype=k.dtype), self.table(k, v, dtype=k.dtype)
        delta_table = self.scalars(-(grad.to(k.dtype) * out).sum(-1), 0.0)
        # rows that were not asked, or that see nothing: +inf makes their weights exactly zero
        shift_table = self.scalars(lse.masked_fill(lse == -torch.inf, torch.inf) * -LOG2E, -torch.inf)
        dq_slots = large_pages(k.new_empty(len(self.active), C, D))
        dk_slots, dv_slots = large_pages(k.new_empty(2, len(self.contents), C * D)).zero_()
        scratch = Scratch()
        for step, queries, windows, keys, bias in self.steps(k.dtype, 2 * D):
            rows, grads = _rows(query_table, queries, scratch, "asked").chunk(2, -1)
            key_rows, values = _rows(key_table, keys, scratch, "shown").chunk(2, -1)
            delta, shift = (
                _rows(table[:, None], queries, scratch, name)
                for table, name in ((delta_table, "delta"), (shift_table, "shift"))
            )
            parts = (
                scratch("dq", rows.shape, rows).zero_(),
                scratch("dk", key_rows.shape, rows),
                scratch("dv", values.shape, rows),
            )
            partial_backward(
                Asked(grads, rows, delta, shift),
                key_rows,
                values,
                bias,
                scale=self.plan.scale,
                into=parts,
                shape=(len(rows), 1, C),
                scratch=scratch,
                fresh=True,
            )
            dq_slots[step] = parts[0]
            for total, part in ((dk_slots, parts[1]), (dv_slots, parts[2])):
                own, *others = part.reshape(*windows.shape, C * D).unbind(1)
                total[step if self.plan.asked is None else windows[:, 0]] += own
                # a chunk is the same neighbour of one other chunk only: no two rows meet, but those of the empty chunk,
                # which are zeros (index_add is slower)
                for window, share in zip(windows.unbind(1)[1:], others):
                    total.index_put_((window,), share, accumulate=True)
        return dq_slots, dk_slots, dv_slots


def _keys(q: Float[Tensor, "M h D"], epsilon: float) -> tuple[Float[Tensor, "M h D"], Float[Tensor, "M h 1"]]:
    """Normalised queries, and the factor that made them; without epsilon a zero query makes a zero key."""
    exact = q.to(torch.promote_types(q.dtype, torch.float32))
    factor = _factor(exact, epsilon)
    return exact * factor, factor


def _factor(q: Float[Tensor, "*rows D"], epsilon: float) -> Float[Tensor, "*rows 1"]:
    """What makes keys of queries."""
    square = q.square().sum(-1, keepdim=True) + q.shape[-1] * epsilon
    return torch.where(square > 0, square, torch.inf).rsqrt()


def _rows(
    table: Float[Tensor, "rows width"], rows: Int[Tensor, "a n"], scratch: Scratch, name: str
) -> Float[Tensor, "a n width"]:
    """Gathered into the scratch: into fresh memory it takes several times as long."""
    found = scratch(name, (*rows.shape, table.shape[1]), table)
    torch.index_select(table, 0, rows.flatten(), out=found.view(-1, table.shape[1]))
    return found


def _sum_rounds(
    x: Float[Tensor, "slots D"], slots: Int[Tensor, "h R n"], weights: Float[Tensor, "h R n"] | None = None
) -> Float[Tensor, "h n D"]:
    """Sorted back into the order of tokens and summed over rounds."""
    each = slots.transpose(1, 2).flatten(0, 1)
    scale = None if weights is None else weights.transpose(1, 2).flatten(0, 1)
    total = nn.functional.embedding_bag(each, x, mode="sum", per_sample_weights=scale)
    return total.view(slots.shape[0], slots.shape[2], -1)


def _blocks(plan: HashedPlan, H: int) -> Iterator[HeadBlock]:
    limit = _SLOTS.get(plan.layout.slot.device.type, _SLOTS_GPU)
    size = max(1, limit // (plan.layout.neighbours.shape[0] * plan.layout.chunk))
    for start in range(0, H, size):
        yield HeadBlock(plan, slice(start, min(start + size, H)))


class _Chunks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, v: Tensor, plan: HashedPlan) -> Tensor:
        asked = slice(None) if plan.asked is None else plan.asked
        out = large_pages(torch.empty_like(q[asked]))
        lse = out.new_empty(out.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for block in _blocks(plan, q.shape[1]):
            heads = block.heads
            part, total = block.forward(q[:, heads], v[:, heads])
            alone = (total == -torch.inf).T[..., None]
            out[:, heads] = torch.where(alone, v[asked, heads], part.transpose(0, 1).to(q.dtype))
            lse[:, heads] = total.T
        ctx.save_for_backward(q, v, out, lse)
        ctx.plan = plan if plan.inside else plan._replace(buckets=None)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (q, v, out, lse), plan = saved, ctx.plan
        asked = slice(None) if plan.asked is None else plan.asked
        dq, dv = large_pages(torch.empty_like(q)), large_pages(torch.empty_like(v))
        for block in _blocks(plan, q.shape[1]):
            heads = block.heads
            mine = (q[:, heads], v[:, heads], grad[:, heads], out[:, heads], lse[:, heads])
            part_q, part_v = block.backward(*mine)
            alone = (lse[:, heads] == -torch.inf)[..., None]
            part_v[:, asked] += torch.where(alone, grad[:, heads], 0).transpose(0, 1)
            dq[:, heads], dv[:, heads] = part_q.transpose(0, 1), part_v.transpose(0, 1)
        return dq, dv, None


def dense_attention(q: Tensor, v: Tensor, plan: HashedPlan) -> Tensor:
    """The same by definition: every pair of tokens, weighted by how often the windows of all rounds show it."""
    tokens, plan = torch.arange(len(q), device=q.device), plan.sorted()
    asked = tokens if plan.asked is None else plan.asked
    with torch.autocast(q.device.type, enabled=False):
        heads = []
        for head in range(q.shape[1]):
            met = HeadBlock(plan, slice(head, head + 1)).times_met(asked[None], tokens[None])[0]
            hidden = tokens >= asked[:, None] if plan.causal else tokens == asked[:, None]
            met = met.masked_fill(hidden, 0)
            k, _ = _keys(q[:, head : head + 1], plan.epsilon)
            bias = (met > 0 if plan.once else met).to(k.dtype).log()
            queries, keys, values = (
                x.transpose(0, 1)[None] for x in (q[asked, head : head + 1], k, v[:, head : head + 1])
            )
            out = dense(queries, keys, values, bias[None, None], scale=plan.scale)[0, 0]
            heads.append(torch.where(met.any(-1, keepdim=True), out, v[asked, head]))
        return torch.stack(heads, 1).to(q.dtype)
