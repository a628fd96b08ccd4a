"""The short kernel: a pattern of blocks by torch's fused attention, its links as a bias. For few keys on a CPU.

Where a query is linked to most keys, gathering each head's own blocks costs more than multiplying by all of them. The
bias is computed for pairs of blocks and spread to tokens. For backward L x S numbers are kept, hence `KEYS`: at most
4 MiB a head in float32, once for the whole batch. O(L·S) time.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.ops.blocks import BlockPattern
from attention_zoo.ops.dispatch import Kernel
from attention_zoo.ops.fused import fused
from attention_zoo.ops.pattern_call import PatternCall
from attention_zoo.ops.plans import with_global_rows

KEYS = 1024
"""Most keys: bounds the bias."""
WORTH = {False: 1.7, True: 3.0}
"""Most keys for each that a query is linked to, two-sided and causal (which leaves out half of all pairs): beyond, the
blocks kernel is faster. At 1,024 tokens and blocks of 64 two-sided by a fifth, at blocks of 16 three times."""
BLOCKS = 64
"""Most blocks of keys: bounds what is computed for pairs of them."""
ROWS = 256
"""Queries of one fused call of a causal pattern: keys that are future for all of them are left out."""


def _refuse(call: PatternCall) -> str | None:
    L, S, block, keys = call.q.shape[2], call.k.shape[2], cast(BlockPattern, call.pattern).block, call.keys
    if call.q.device.type != "cpu":
        return f"it runs on CPU, not on {call.q.device.type}"
    if call.q.dtype not in (torch.float32, torch.float64):
        return f"{str(call.q.dtype).removeprefix('torch.')} would round the bias"
    if S > KEYS:
        return f"{S} keys are no short call (at most {KEYS})"
    if -(-S // block) > BLOCKS:
        return f"{S} keys are more than {BLOCKS} blocks of {block}"
    if not 0 < L <= S:
        return "there are no queries, or more than keys"
    if call.learned:
        return "the bias learns"
    if not call.starts_at_zero or not call.all_valid:
        return "columns are not positions here (padding, holes, documents or forgotten keys)"
    if reason := _too_few_links(call):
        return reason
    whole = keys.is_global[:1, ::block].repeat_interleave(block, 1)[:, :S]
    asked = call.queries.is_global != whole[:, S - L :]
    if bool((keys.is_global != whole).any() | asked.any() | (keys.length != keys.length[:1, :1]).any()):
        return "batch rows differ, or less than a block is global"
    return None


def _too_few_links(call: PatternCall) -> str | None:
    pattern = cast(BlockPattern, call.pattern)
    linked = pattern.linked * pattern.block + int(call.keys.is_global[0].sum())
    most = int(WORTH[pattern.causal] * linked)
    if call.k.shape[2] > most:
        return f"{call.k.shape[2]} keys are no short call where a query sees {linked} (at most {most})"
    return None


def _run(call: PatternCall) -> Tensor:
    L, S = call.q.shape[2], call.k.shape[2]
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    keys = Tokens(*(field[:1] for field in call.keys))  # all batch rows are alike
    blocks, causal = _of_blocks(call, keys), call.pattern.causal
    if blocks is None and not call.has_position_bias and (L == S or not causal):
        out = fused(q, k, v, scale=call.scale, causal=causal)
        return out if call.global_qkv is None else with_global_rows(call, out)
    size = ROWS if causal else L
    found = []
    for start in range(0, L, size):
        rows = slice(start, min(start + size, L))
        seen = slice(0, rows.stop + S - L if causal else S)
        bias = _of_tokens(call, keys, blocks, slice(rows.start + S - L, rows.stop + S - L), seen)
        found.append(fused(q[:, :, rows], k[:, :, seen], v[:, :, seen], bias, scale=call.scale))
    out = found[0] if len(found) == 1 else torch.cat(found, 2)
    return out if call.global_qkv is None else with_global_rows(call, out)


SHORT = Kernel("short", _run, _refuse, f"up to {KEYS} keys: torch's fused attention on all of them, links as its bias")


_known: WeakKeyDictionary[Any, tuple[Any, Tensor | None]] = WeakKeyDictionary()
"""Each pattern's last bias between blocks, with what it depends on: links are costly for so few tokens."""


def _of_blocks(call: PatternCall, keys: Tokens) -> Tensor | None:
    """The bias between blocks, [1, H, n, n]: all tokens of a block see, and are seen, alike.

    None: it hides and weighs nothing but the future.
    """
    pattern = cast(BlockPattern, call.pattern)
    first = keys.cut(slice(0, None, pattern.block))
    made_of = (pattern.block, first.length.tolist(), first.is_global.tolist(), call.q.dtype)
    known = _known.get(pattern)
    if known is None or known[0] != made_of:
        everyone = first.is_global[:, None, :, None] | first.is_global[:, None, None, :]
        with torch.inference_mode(False):  # it outlives this call
            bias = pattern.bias(first, first).detach().masked_fill(everyone, 0).to(call.q.dtype)
        past = bias.tril() if pattern.causal else bias
        known = _known[pattern] = (made_of, bias if bool(past.any()) else None)
    return known[1]


def _of_tokens(call: PatternCall, keys: Tokens, blocks: Tensor | None, rows: slice, columns: slice) -> Tensor:
    """The bias of these columns of queries and of keys, [1, H, rows, n]. A query sees its own block, so something."""
    block = cast(BlockPattern, call.pattern).block
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
