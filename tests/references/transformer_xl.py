"""Transformer-XL as the paper writes it: a loop over segments that hands on its memory, and over tokens within.

float64, slow, obvious, differentiable by plain autograd; shares nothing with the layer but its parameters and options.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_zoo.attention.transformer_xl import TransformerXL
from attention_zoo.contract import Tokens


def reference(layer: TransformerXL, x: Tensor, tokens: Tokens) -> Tensor:
    """What `layer(x, tokens).hidden` must be at valid tokens; zeros at padding."""
    rows = []
    for row in range(x.shape[0]):
        out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
        valid = [column for column in range(x.shape[1]) if tokens.valid[row, column]]
        for document in sorted({int(tokens.document[row, column]) for column in valid}):
            columns = [column for column in valid if int(tokens.document[row, column]) == document]
            positions = [int(tokens.position[row, column]) for column in columns]
            for column, hidden in zip(columns, _document(layer, [x[row, column] for column in columns], positions)):
                out[column] = hidden
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _document(layer: TransformerXL, hidden: list[Tensor], positions: list[int]) -> list[Tensor]:
    """The loop over segments. Memory is a list of (position, detached hidden state)."""
    S, M = layer.segment_length, layer.memory_length
    memory: list[tuple[int, Tensor]] = []
    out = []
    for segment in range(positions[-1] // S + 1):
        own = [(p, h) for p, h in zip(positions, hidden) if p // S == segment]
        for p, h in own:
            oldest = p - M if layer.same_length else segment * S - M
            seen = [(at, key) for at, key in memory + own if oldest <= at <= p]
            out.append(_token(layer, p, h, seen))
        memory = [(p, h.detach()) for p, h in memory + own if p >= (segment + 1) * S - M]
    return out


def _token(layer: TransformerXL, p: int, h: Tensor, seen: list[tuple[int, Tensor]]) -> Tensor:
    """One query over the keys that it sees."""
    H, D = layer.heads, layer.head_width
    q = layer.to_q(h).view(H, D)
    scores, values = [], []
    for at, key in seen:
        k = layer.to_k(key).view(H, D)
        r = layer.to_r(_wave(p - at, layer.dim).to(h)).view(H, D)
        scores.append(layer.scale * (((q + layer.u) * k).sum(-1) + ((q + layer.v) * r).sum(-1)))
        values.append(layer.to_v(key).view(H, D))
    weights = torch.stack(scores).softmax(0)  # [keys, H]
    return layer.to_out((weights[..., None] * torch.stack(values)).sum(0).flatten())


def _wave(distance: int, dim: int) -> Tensor:
    angles = [distance / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
