"""LSH attention on CUDA: the chunks of ops/lsh/chunks.py run by the kernels of ops/softmax/triton.py.

A chunk of sorted tokens is a block, the chunks of its window are its list; rows are gathered on chip, straight from the
table of all tokens. Rounds are merged, and gradients summed over rounds, as on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.lsh.chunks import HeadBlock
from attention_zoo.ops.softmax import triton
from attention_zoo.ops.softmax.triton import Lists


class TritonHeadBlock(HeadBlock):
    """The chunks of a few heads; see `HeadBlock`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = self.table(q, dtype=q.dtype), self.table(k, v, dtype=q.dtype)
        D, slots = q.shape[-1], len(self.active) * self.plan.layout.chunk
        out = torch.zeros(1, 1, slots, D, device=q.device)
        lse = triton.forward(
            queries[None, None], keys[None, None, :, :D], keys[None, None, :, D:], self._lists(), scale=self.plan.scale,
            out=out,
        )  # fmt: skip
        chunks = (len(self.active), self.plan.layout.chunk)
        return out.view(*chunks, D), lse.view(chunks)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        D = q.shape[-1]
        queries, keys = self.table(q, grad, dtype=q.dtype), self.table(k, v, dtype=q.dtype)
        lse, delta = self.scalars(lse, torch.inf), self.scalars((grad.float() * out.float()).sum(-1), 0.0)
        dq = torch.zeros(1, 1, len(self.active) * self.plan.layout.chunk, D, device=q.device)
        dk, dv = torch.empty(2, 1, 1, self.contents.numel(), D, device=q.device)
        triton.backward(
            queries[None, None, :, D:], queries[None, None, :, :D], keys[None, None, :, :D], keys[None, None, :, D:],
            delta[None, None], lse[None, None], self._lists(), scale=self.plan.scale, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip
        return dq.view(-1, D), dk.view(-1, D), dv.view(-1, D)

    def _lists(self) -> Lists:
        """Tokens of a document come in the order of time, so that a row's number is its time."""
        rows = self.contents.int()
        empty = rows == self.rows
        label = torch.zeros_like(rows) if self.labels is None else self.labels.int()
        neighbours = self.neighbours.masked_fill(~self.present, -1)[self.active]
        links, count, _, _ = Lists.packed(neighbours[None, None])
        asks = self.active

        def flat(x: Tensor) -> Tensor:
            return x.reshape(1, -1)

        return Lists(
            links,
            count,
            q_time=flat(rows[asks]),
            q_label=flat(label.masked_fill(empty, -2)[asks]),
            k_time=flat(rows),
            k_label=flat(label.masked_fill(empty, -1)),
            block=self.plan.layout.chunk,
            causal=self.plan.causal,
            strict=True,
            q_rows=flat(rows[asks]),
            k_rows=flat(rows),
        )
