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
    keys = torch.stack([key for _, key in seen])
    q = layer.to_q(h).view(H, D)
    k, v = layer.to_k(keys).view(-1, H, D), layer.to_v(keys).view(-1, H, D)
    r = layer.to_r(_waves([p - at for at, _ in seen], layer.dim).to(h)).view(-1, H, D)
    scores = layer.scale * (((q + layer.u) * k).sum(-1) + ((q + layer.v) * r).sum(-1))
    return layer.to_out((scores.softmax(0)[..., None] * v).sum(0).flatten())


def _waves(distances: list[int], dim: int) -> Tensor:
    frequencies = [10_000 ** (-2 * i / dim) for i in range(dim // 2)]
    waves = [[wave(d * f) for wave in (math.sin, math.cos) for f in frequencies] for d in distances]
    return torch.tensor(waves, dtype=torch.float64)
