"""Block-recurrent attention as the paper writes it: block after block, token after token, head after head.

float64, slow, differentiable by plain autograd; shares nothing with the layer but its parameters and options.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_zoo.attention.block_recurrent import BlockRecurrent
from attention_zoo.contract import Tokens


def reference(layer: BlockRecurrent, x: Tensor, tokens: Tokens) -> Tensor:
    """What `layer(x, tokens).hidden` must be at valid tokens; zeros at padding."""
    rows = []
    for row in range(x.shape[0]):
        out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
        valid = [column for column in range(x.shape[1]) if tokens.valid[row, column]]
        for document in sorted({int(tokens.document[row, column]) for column in valid}):
            columns = [column for column in valid if int(tokens.document[row, column]) == document]
            for column, hidden in zip(columns, _document(layer, torch.stack([x[row, column] for column in columns]))):
                out[column] = hidden
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _document(layer: BlockRecurrent, x: Tensor) -> list[Tensor]:
    W, hidden = layer.window, []
    vectors = layer.initial
    q, k, v = layer.local.to_q(x), layer.local.to_k(x), layer.local.to_v(x)
    q_of_state = layer.to_q_of_state(x)
    for start in range(0, len(x), W):
        block = range(start, min(start + W, len(x)))
        state_k, state_v, state_q, state_q_of_tokens = _projected(layer, vectors)
        for i in block:
            seen = range(max(0, i - W), i + 1)
            near = _look(layer, q[i], k[seen], v[seen], gaps=[i - j for j in seen], at=i)
            far = _look(layer, q_of_state[i], state_k, state_v)
            hidden.append(layer.to_out(torch.cat([near, far])))
        if len(block) == W:
            vectors = torch.stack([
                _renewed(
                    layer, vectors[s],
                    torch.cat([
                        _look(layer, state_q[s], state_k, state_v),
                        _look(layer, state_q_of_tokens[s], k[block], v[block]),
                    ]),
                )
                for s in range(layer.states)
            ])  # fmt: skip
            if layer.truncate is not None and (start // W + 1) % layer.truncate == 0:
                vectors = vectors.detach()
    return hidden


def _projected(layer: BlockRecurrent, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = vectors.mean(-1, keepdim=True), vectors.var(-1, keepdim=True, unbiased=False)
    normal = (vectors - mean) / (var + 1e-5).sqrt()
    seen = normal + layer.identity
    return layer.state_k(seen), layer.state_v(seen), layer.state_q(seen), layer.state_q_of_tokens(seen)


def _renewed(layer: BlockRecurrent, old: Tensor, found: Tensor) -> Tensor:
    new = layer.state_out(found)
    if layer.gate == "fixed":
        g = 1 / (1 + (-layer.keep).exp())
        return old * g + new * (1 - g)
    f = 1 / (1 + (-(layer.forget_gate(found) + 1)).exp())
    i = 1 / (1 + (-(layer.input_gate(found) - 1)).exp())
    return old * f + new.tanh() * i


def _look(layer: BlockRecurrent, q: Tensor, k: Tensor, v: Tensor, gaps: list[int] | None = None, at: int = 0) -> Tensor:
    """One query's softmax over these keys, head by head."""
    D, group, heads = layer.head_width, layer.heads // layer.kv_heads, []
    for h in range(layer.heads):
        mine, theirs = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        query, keys = q[mine], k[:, theirs]
        if gaps and layer.positions == "rotary":
            query = _turned(query, at)
            keys = torch.stack([_turned(key, at - gap) for key, gap in zip(keys, gaps)])
        scores = layer.scale * (keys @ query)
        if gaps and layer.positions == "alibi":
            scores = scores - 2.0 ** (-8 * (h + 1) / layer.heads) * torch.tensor(gaps)
        heads.append(scores.softmax(0) @ v[:, theirs])
    return torch.cat(heads)


def _turned(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    found = x.clone()
    for n in range(half):
        angle = position * 10000.0 ** (-n / half)
        a, b = x[n], x[n + half]
        found[n] = a * math.cos(angle) - b * math.sin(angle)
        found[n + half] = a * math.sin(angle) + b * math.cos(angle)
    return found
