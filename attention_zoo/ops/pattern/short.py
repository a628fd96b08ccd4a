"""The short kernel: a pattern of blocks by torch's fused attention, its links as a bias. For few keys on a CPU.

Where a query is linked to most keys, gathering each head's own blocks costs more than multiplying by all of them. The
bias is computed for pairs of blocks and spread to tokens. For backward L x S numbers are kept, hence `KEYS`: at most
4 MiB a head in float32, once for the whole batch. O(L·S) time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attention_zoo.layout.host import array_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.tokens import Tokens

KEYS = 1024
"""Most keys: bounds the bias."""
WORTH = {False: 1.7, True: 3.0}
"""Most keys for each that a query is linked to, two-sided and causal (which leaves out half of all pairs): beyond, the
blocks kernel is faster. At 1,024 tokens and blocks of 64 two-sided by a fifth, at blocks of 16 three times."""
BLOCKS = 64
"""Most blocks of keys: bounds what is computed for pairs of them."""
ROWS = 256
"""Queries of one fused call of a causal pattern: keys that are future for all of them are left out."""


def _is_few(call: PatternCall) -> str | None:
    S, size = call.k.shape[2], call.blocks.size
    if S > KEYS:
        return f"{S} keys are no short call (at most {KEYS})"
    return f"{S} keys are more than {BLOCKS} blocks of {size}" if -(-S // size) > BLOCKS else None


def _links_are_many(call: PatternCall) -> str | None:
    linked = call.blocks.most * call.blocks.size + int(call.keys.host.is_global[:1].sum())
    most, S = int(WORTH[call.pattern.causal] * linked), call.k.shape[2]
    return f"{S} keys are no short call where a query sees {linked} (at most {most})" if most < S else None


def _whole_blocks_are_global(call: PatternCall) -> str | None:
    (L, S), size = call.lengths, call.blocks.size
    if L > S:
        return facts.queries_within_keys(call)
    queries, keys = call.queries.host, call.keys.host
    whole = np.repeat(keys.is_global[:1, ::size], size, 1)[:, :S]
    differ = (keys.is_global != whole).any() or (queries.is_global != whole[:, S - L :]).any()
    if bool(differ or (keys.length != keys.length[:1, :1]).any()):
        return "batch rows differ, or less than a block is global"
    return None


def _run(call: PatternCall) -> Tensor:
    L, S = call.q.shape[2], call.k.shape[2]
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    keys = call.keys.cut(slice(None), slice(0, 1))  # all batch rows are alike
    blocks, causal = _of_blocks(call), call.pattern.causal
    if blocks is None and not call.has_position_bias and (L == S or not causal):
        return fused(q, k, v, scale=call.scale, causal=causal)
    size = ROWS if causal else L
    found = []
    for start in range(0, L, size):
        rows = slice(start, min(start + size, L))
        seen = slice(0, rows.stop + S - L if causal else S)
        bias = _of_tokens(call, keys, blocks, slice(rows.start + S - L, rows.stop + S - L), seen)
        found.append(fused(q[:, :, rows], k[:, :, seen], v[:, :, seen], bias, scale=call.scale))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


SHORT: Kernel[PatternCall] = Kernel(
    "short",
    _run,
    (
        facts.on_cpu,
        facts.no_sink,
        facts.exact_bias,
        _is_few,
        facts.queries_within_keys,
        facts.bias_is_fixed,
        facts.from_zero,
        facts.no_padding,
        _links_are_many,
        _whole_blocks_are_global,
    ),
    f"up to {KEYS} keys: torch's fused attention on all of them, links as its bias",
    (facts.is_blocks,),
)


def _of_blocks(call: PatternCall) -> Tensor | None:
    """The bias between blocks, [1, H, n, n]: all tokens of a block see, and are seen, alike.

    None: it hides and weighs nothing but the future. Kept from call to call: links are costly for so few tokens.
    """
    size, dtype = call.blocks.size, call.q.dtype
    host = call.keys.host
    made_of = (host.length[:1, ::size].tobytes(), host.is_global[:1, ::size].tobytes(), dtype)

    def make() -> Tensor | None:
        first = call.keys.cut(slice(0, None, size), slice(0, 1))
        everyone = first.is_global[:, None, :, None] | first.is_global[:, None, None, :]
        with torch.inference_mode(False):  # it outlives this call
            bias = call.pattern.bias(first, first).detach().masked_fill(everyone, 0).to(dtype)
        past = bias.tril() if call.pattern.causal else bias
        return bias if bool(array_of(past.bool()).any()) else None

    return call.blocks.kept(("short", *made_of), make)


def _of_tokens(call: PatternCall, keys: Tokens, blocks: Tensor | None, rows: slice, columns: slice) -> Tensor:
    """The bias of these columns of queries and of keys, [1, H, rows, n]. A query sees its own block, so something."""
    block = call.blocks.size
    row = torch.arange(rows.start, rows.stop, device=call.q.device)
    if blocks is None:
        bias = call.q.new_zeros(1, 1, len(row), columns.stop)
    else:
        bias = blocks.repeat_interleave(block, 3)[..., columns].index_select(2, row // block)
    extra = call.pattern.position_bias(keys.cut(rows), keys.cut(columns))
    bias = bias if extra is None else bias + extra.to(bias.dtype)
    if call.pattern.causal:
        # earlier columns are past for all of these rows
        column = torch.arange(rows.start, columns.stop, device=row.device)
        bias[..., rows.start :].masked_fill_(column > row[:, None], -torch.inf)
    return bias
