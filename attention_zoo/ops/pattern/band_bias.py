"""What is added to the scores of a band's tiles: the same for all of them, but for padding and documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.softmax.parts import Windows


class BandBias:
    """The bias of every tile: what one tile would have that reaches beyond both ends, cut to the keys there are."""

    def __init__(self, call: PatternCall, size: int, reach: int, stride: int):
        self.call, self.size, self.reach, self.stride = call, size, reach, stride
        self.plain = call.all_valid and call.one_document and not call.hides_globals
        self.offset = call.k.shape[2] - call.q.shape[2]
        self.held: Tensor | None = None

    def __call__(self, rows: slice, columns: slice, batch: slice) -> Tensor:
        call = self.call
        if self.held is None:
            self.held = self._whole()
        bias = self._cut(self.held, rows, columns)
        if self.plain or self._shows_all(columns):
            return bias
        queries, keys = call.queries.cut(rows, batch), call.keys.cut(columns, batch)
        seen = keys.valid if not call.hides_globals else keys.valid & ~keys.is_global
        seen = seen[:, None, None, :]
        if not call.one_document:
            seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])[:, None]
        return bias.masked_fill(~seen, -torch.inf)

    def _shows_all(self, columns: slice) -> bool:
        """Whether there is neither padding among these keys nor a global one that is hidden, nor another document."""
        if not self.call.one_document:
            return False
        keys = self.call.keys.host.cut(columns)
        return bool(keys.valid.all()) and not (self.call.hides_globals and keys.is_global.any())

    def blocks(self, windows: Windows, start: int, head: int, batch: slice) -> Tensor:
        """The same of blocks of rows from `start` on, each with its window of keys, [b|1, 1, count|1, size, width]."""
        call, (_, width, step, count) = self.call, windows
        if self.held is None:
            self.held = self._whole()
        bias = self.held[:, head : head + 1, None] if self.held.shape[1] > 1 else self.held[:, :, None]
        columns = slice(windows.first, windows.first + (count - 1) * step + width)
        if self.plain or self._shows_all(columns):
            return bias
        keys = call.keys.cut(columns, batch)
        seen = keys.valid if not call.hides_globals else keys.valid & ~keys.is_global
        seen = seen.unfold(1, width, step)[:, None, :, None]
        if not call.one_document:
            queries = call.queries.cut(slice(start, start + count * self.size), batch)
            document = queries.document.view(-1, count, self.size)[..., None]
            seen = seen & (keys.document.unfold(1, width, step)[:, :, None] == document)[:, None]
        return bias.masked_fill(~seen, -torch.inf)

    def _cut(self, whole: Tensor, rows: slice, columns: slice) -> Tensor:
        before = (columns.start - (rows.start + self.offset)) // self.stride + self.reach
        height, width = (len(range(x.start, x.stop, self.stride)) for x in (rows, columns))
        return whole[:, :, :height, before : before + width]

    def learn(self, heads: slice, learned: list[Tensor]) -> None:
        """Compute it now, with its graph: tiles sum its gradient, which goes on from there once, whatever the length.

        Args:
            heads: of the tiles.
            learned: tensors that the tiles hand gradients to; it becomes one of them.
        """
        whole = self._whole()
        self.heads, self.place, self.held = heads, len(learned), whole.detach()
        learned.append(whole)

    def learned(self, rows: slice, columns: slice, sums: Sequence[Tensor], dscores: Tensor, batch: slice) -> None:
        """As `Part.learn`. What is hidden has no weight, hence no gradient."""
        del batch  # all rows share the bias
        into = sums[self.place]
        into = self._cut(into[:, self.heads] if into.shape[1] > 1 else into, rows, columns)
        into += dscores.sum_to_size(into.shape)

    def learned_blocks(self, head: int, sums: Sequence[Tensor], dscores: Tensor, batch: slice) -> None:
        """The same of blocks of a head, [1, blocks, size, width]."""
        del batch  # all rows share the bias
        into = sums[self.place]
        into = into[:, head : head + 1] if into.shape[1] > 1 else into
        into += dscores.sum_to_size(into.shape)

    def _whole(self) -> Tensor:
        """Of queries at `reach`, `reach` + 1, ... and all the keys that one of them sees, from `first` on."""
        call, device = self.call, self.call.q.device
        count = self.size + self.reach * (1 if call.pattern.causal else 2)
        # behind the first tokens, which all see: see first.py
        position = call.band.first + torch.arange(0, count * self.stride, self.stride, device=device)[None]
        keys = Layout.plain(1, count, device)._replace(position=position)
        queries = keys.cut(slice(self.reach, self.reach + self.size))
        whole = call.pattern.scores_bias(queries, keys)
        if call.pattern.causal:
            future = keys.position[:, None, :] > queries.position[:, :, None]
            whole = whole.masked_fill(future[:, None], -torch.inf)
        return whole
