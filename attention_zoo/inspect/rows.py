"""Weights of a pattern by its definition, some queries at a time: what long texts can be asked token by token.

weights = softmax(scale · q·k + bias),  a chunk of rows against all keys: O(L²) time, O(rows · L) memory
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.inspect.origins import layout_of
from attention_zoo.inspect.probe import Call
from attention_zoo.layout.layout import Layout

AT_ONCE = 2**21
"""Weights that are held at a time."""


def is_plain(call: Call) -> bool:
    """Whether the formula above is all that there is: no projections of tokens that see everything, no sinks without a
    value or in a cache."""
    layer: Any = call.way.formula
    if layer is None or layer.cross or not call.of_tokens:
        return False
    if layer.sink is not None or getattr(layer.reach, "in_cache", False):
        return False
    return not (layer.computes_apart and layer.mark(_tokens(call)).is_global.any())


@torch.no_grad()
def rows(call: Call) -> Iterator[tuple[slice, Float[Tensor, "H n L"]]]:
    """Chunks of queries with their weights on all keys, in float64 where the call is, else in float32."""
    layer: Any = call.way.formula
    tokens, L, x = _tokens(call), call.length, call.parts[0].given.x
    exact = torch.promote_types(x.dtype, torch.float32)
    q, k = (
        layer.scheme.rotate(rearrange(to(x), "b l (h d) -> b h l d", d=layer.head_width), tokens.position)
        for to in (layer.to_q, layer.to_k)
    )
    plain = Tokens(*tokens)
    k = k.repeat_interleave(layer.heads // layer.kv_heads, 1)[0].to(exact)
    size = max(1, AT_ONCE // (layer.heads * L))
    for a in range(0, L, size):
        some = slice(a, min(a + size, L))
        # a cut of plain tokens: a layout remembers its cuts, and each of them who sees whom
        bias = layer.full_bias(tokens.cut(some), plain)[0].to(exact)
        yield some, (layer.scale * q[0, :, some].to(exact) @ k.mT + bias).softmax(-1).nan_to_num()


def _tokens(call: Call) -> Layout:
    return layout_of(call.parts[0].given.x, call.parts[0].given.tokens)
