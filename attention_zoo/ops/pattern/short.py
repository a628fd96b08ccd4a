"""The short kernel: a pattern of blocks by torch's fused attention, its links as a bias. For few keys on a CPU.

Where a query is linked to most keys, gathering each head's own blocks costs more than multiplying by all of them. What
links say between blocks is computed once for each number of blocks that a document has, and spread to tokens wherever
these lie: short rows with padding, documents and global tokens cost little more than plain ones. For backward L x S
numbers a head are kept, once for all batch rows that are alike, hence `KEYS` and `CELLS`. O(L·S) time.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, array_of, tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.sdpa import run_sdpa
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.tokens import Tokens

KEYS = 1024
"""Most keys."""
CELLS = 1 << 24
"""Most numbers of the bias where batch rows differ: 64 MiB in float32."""
TILES = 8
"""So many tiles of keys are always few, 512: multiplying by all of them costs less than gathering, whatever blocks and
batch are."""
WORTH = {False: 1.7, True: 3.0}
"""Beyond, most keys for each that a query is linked to, two-sided and causal (which leaves out half of all
pairs); with more the blocks kernel is faster. At 1,024 tokens and blocks of 64 two-sided by a tenth, at blocks of 16
twice."""
PAIRS = 1 << 18
"""Most pairs of blocks that a bias is computed for, of documents of all numbers of blocks together."""
ROWS = 256
"""Queries of one fused call of a causal pattern: keys that are future for all of them are left out."""


def _is_few(call: PatternCall) -> str | None:
    (L, S), (B, H), size = call.lengths, call.q.shape[:2], call.blocks.size
    if S > KEYS:
        return f"{S} keys are no short call (at most {KEYS})"
    where = Where.of(call)
    if len(where.counts) * where.blocks**2 > PAIRS:
        return f"{S} keys are too many blocks of {size}, in documents of {len(where.counts)} lengths"
    if not where.alike and B * H * L * S > CELLS:
        return f"batch rows differ, and their biases would be too large (at most {CELLS} numbers)"
    return None


def _links_are_many(call: PatternCall) -> str | None:
    linked = call.blocks.most * call.blocks.size + int(call.keys.host.is_global[:1].sum())
    few = TILES * call.pattern.tile
    most, S = max(few, int(WORTH[call.pattern.causal] * linked)), call.k.shape[2]
    return f"{S} keys are no short call where a query sees {linked} (at most {most})" if most < S else None


class Where:
    """In which blocks of their documents the tokens of a call lie. What holds for all batch rows is said once.

    Attributes:
        rows: [b, L], of each query the row in the table of what blocks see, `n` for documents of each number of blocks.
        columns: [b, S], the block of each key.
        everyone: [b, L] and [b, S], which of them are global; None: there are none.
        counts: how many blocks the documents have, as `links` wants to hear it, the fewest first.
        blocks: n, more than the last block of all.
        plain: [B, rows] and [B, n], which rows of the table, and which blocks, have a token that is not global.
        complete: a batch row without padding, as which all others are seen: whatever they have of padding is the future
            of all their tokens. None: there is none.
        alike: whether one bias serves all batch rows.
    """

    def __init__(self, call: PatternCall):
        reach, queries, keys = call.blocks, call.queries.host, call.keys.host
        count = reach.blocks_of(queries.length)
        count = np.where(queries.valid, count, count.max(where=queries.valid, initial=0))
        self.counts, place = np.unique(count, return_inverse=True)
        row, column = (np.where(each.valid, each.position // reach.size, 0) for each in (queries, keys))
        self.blocks = 1 + max(int(row.max(initial=0)), int(column.max(initial=0)))
        row = place.reshape(count.shape) * self.blocks + row
        fields = [(row, queries), (queries.is_global, queries), (column, keys), (keys.is_global, keys)]
        merged = [_merged(field, of.valid) for field, of in fields]
        one = all(each is not None for each in merged)
        device, found = call.q.device, [found for found in merged if found is not None]
        at, of_rows, columns, of_columns = found if one else [field for field, _ in fields]
        self.plain = tuple(
            _present(at, each.valid & ~each.is_global, size)
            for at, each, size in ((row, queries, len(self.counts) * self.blocks), (column, keys, self.blocks))
        )
        self.same_columns = merged[2] is not None
        self.rows = tensor_of(at, device)
        self.columns = tensor_of(columns if merged[2] is None else merged[2], device)
        some = call.keys.any_global or call.queries.any_global
        self.everyone = (tensor_of(of_rows, device), tensor_of(of_columns, device)) if some else None
        self.past = call.pattern.causal and call.starts_at_zero
        self.complete = _complete(keys) if one and call.pattern.causal and call.own_keys else None
        self.alike = one and (self.past or call.rows_alike or self.complete is not None)

    @staticmethod
    def of(call: PatternCall) -> Where:
        """Once for all layers with such blocks."""
        reach = call.blocks
        key = ("short", reach.size, reach.knows_length, call.pattern.causal, id(call.queries))
        return call.keys.plan(key, lambda: (Where(call), call.queries))[0]


def _present(at: Int[np.ndarray, "B n"], of: Bool[np.ndarray, "B n"], size: int) -> Bool[np.ndarray, "B {size}"]:
    """Which of so many places some of these tokens have."""
    found = np.zeros((len(at), size), bool)
    found[of.nonzero()[0], at[of]] = True
    return found


def _complete(keys: Host) -> int | None:
    """A row without padding, where all others are as it is, but for padding at their end."""
    whole = np.flatnonzero(keys.valid.all(1))
    if not len(whole) or bool((keys.valid[:, 1:] > keys.valid[:, :-1]).any()):
        return None
    row = int(whole[0])
    differ = (keys.position != keys.position[row]) | (keys.document != keys.document[row])
    return None if bool((differ & keys.valid).any()) else row


def _merged(field: Array, valid: Bool[np.ndarray, "B n"]) -> Array | None:
    """[1, n], the field of all rows where they agree; padding agrees with everything. None: they do not."""
    most = np.where(valid, field, 0).max(0, keepdims=True, initial=0).astype(field.dtype)
    return most if bool((field == most)[valid].all()) else None


def _run(call: PatternCall) -> Tensor:
    L, S = call.lengths
    where, causal = Where.of(call), call.pattern.causal
    table = table_of(call, where)
    if _links_tell_nothing(call, where, table) and not call.has_position_bias and facts.mask_is_small(call) is None:
        return run_sdpa(call)
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    q, k, v = (x.to(_exact(call)) for x in (q, k, v))
    size = ROWS if causal else L
    found = []
    for start in range(0, L, size):
        rows = slice(start, min(start + size, L))
        columns = slice(0, rows.stop + S - L if causal else S)
        bias = _bias(call, where, table, rows, columns)
        found.append(fused(q[:, :, rows], k[:, :, columns], v[:, :, columns], bias, scale=call.scale))
    return call.blank((found[0] if len(found) == 1 else torch.cat(found, 2)).to(call.q.dtype))


def _exact(call: PatternCall) -> torch.dtype:
    """Half precision would round what links add."""
    return torch.promote_types(call.q.dtype, torch.float32)


SHORT: Kernel[PatternCall] = Kernel(
    "short",
    _run,
    (
        facts.on_cpu,
        facts.no_sink,
        facts.queries_within_keys,
        facts.own_keys,
        facts.bias_is_fixed,
        _is_few,
        _links_are_many,
    ),
    f"up to {KEYS} keys: torch's fused attention on all of them, links as its bias",
    (facts.is_blocks,),
)


def table_of(call: PatternCall, where: Where) -> Float[Tensor, "#H C_n n"] | None:
    """The bias between blocks: all tokens of a block see, and are seen, alike.

    None: it hides and weighs nothing but the future. Kept from call to call: links are costly for so few tokens.
    """
    reach, n, dtype = call.blocks, where.blocks, _exact(call)

    def make() -> Tensor | None:
        counts = torch.from_numpy(where.counts if reach.knows_length else np.full(1, n))[:, None]
        with torch.inference_mode(False):  # it outlives this call
            block = torch.arange(n).expand(len(counts), -1)
            there, none = block < counts, torch.zeros_like(block)
            tokens = Tokens(block * reach.size, there, none.bool(), none, (counts * reach.size).expand_as(block))
            bias = call.pattern.bias(tokens, tokens).detach().to(dtype)
        told = (bias.tril() if call.pattern.causal else bias) != 0
        if not bool(array_of(told & there[:, None, None] & there[:, None, :, None]).any()):
            return None
        return bias.expand(len(counts), -1, n, n).transpose(0, 1).flatten(1, 2)

    return reach.kept(("short", where.counts.tobytes(), n, dtype), make)


def _links_tell_nothing(call: PatternCall, where: Where, table: Tensor | None) -> bool:
    """Whether what links hide or weigh lies between tokens of which one is global."""
    if table is None:
        return True
    told = call.blocks.kept(("short told", where.counts.tobytes(), where.blocks), lambda: _told(call, where, table))
    rows, columns = where.plain
    return not bool((told & rows[:, :, None] & columns[:, None]).any())


def _told(call: PatternCall, where: Where, table: Float[Tensor, "H R n"]) -> Bool[np.ndarray, "R n"]:
    """Between which blocks links hide or weigh something for some head; the future is hidden without them."""
    each = table.unflatten(1, (len(where.counts), -1))
    told: Array = array_of(((each.tril() if call.pattern.causal else each) != 0).any(0).flatten(0, 1))
    return told


def _bias(
    call: PatternCall, where: Where, table: Tensor | None, rows: slice, columns: slice
) -> Float[Tensor, "b H l s"]:
    """Of these queries and keys. A query sees itself, so something; padding sees whatever it may."""
    one = where.complete or 0
    some = slice(one, one + 1) if where.alike or where.past else slice(None)
    queries, keys = call.queries.cut(rows, some), call.keys.cut(columns, some)
    if where.past:  # padding is the future of all others
        plain = Layout.plain(1, call.k.shape[2], call.k.device)
        before = call.k.shape[2] - call.q.shape[2]
        queries, keys = plain.cut(slice(rows.start + before, rows.stop + before)), plain.cut(columns)
    bias = _of_links(call, where, table, rows, columns)
    if where.everyone is not None and table is not None:
        of_rows, of_columns = where.everyone
        bias.masked_fill_(of_rows[:, None, rows, None] | of_columns[:, None, None, columns], 0)
    extra = call.pattern.position_bias(queries, keys)
    bias = bias if extra is None else bias + extra.to(bias.dtype)
    seen = call.seen(queries, keys)
    # fresh memory costs more than what is done to it: as little of it as can be
    if len(bias) == len(seen) and table is not None:
        found = bias.masked_fill_(~seen, -torch.inf)
    else:
        found = large_pages(bias.new_empty(torch.broadcast_shapes(bias.shape, seen.shape)))
        torch.where(seen, bias, bias.new_full((), -torch.inf), out=found)
    if not (where.past or call.queries.dense):  # padding may see nothing
        padding = np.nonzero(~call.queries.host.valid[some, rows])
        found.transpose(1, 2).index_put_(tuple(tensor_of(each, found.device) for each in padding), found.new_zeros(()))
    return found


def _of_links(call: PatternCall, where: Where, table: Tensor | None, rows: slice, columns: slice) -> Tensor:
    """What links say, [b, H|1, l, s], fresh; without a table all zeros."""
    if table is None:
        return call.q.new_zeros(1, 1, 1, 1, dtype=_exact(call))
    row, column = where.rows[:, rows], where.columns[:, columns]
    if where.same_columns:
        table = table.index_select(2, where.columns[0, columns])
    found = large_pages(table.new_empty(len(table), row.numel(), table.shape[2]))
    torch.index_select(table, 1, row.flatten(), out=found)
    found = found.unflatten(1, row.shape)
    if not where.same_columns:
        found = found.gather(3, column[None, :, None].expand(len(found), -1, row.shape[1], -1))
    return found.transpose(0, 1)
