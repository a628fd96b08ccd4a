"""The Compressive Transformer as the paper writes it: a loop over segments that evicts and compresses, token by token.

float64, slow, obvious, differentiable by plain autograd; shares nothing with the layer but its parameters and options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.attention.compressive import Compressive
from attention_zoo.contract import Tokens
from references.transformer_xl import _waves

Memory = list[tuple[int, Tensor]]


def reference(layer: Compressive, x: Tensor, tokens: Tokens) -> Tensor:
    """What `layer(x, tokens).hidden` must be at valid tokens; zeros at padding."""
    rows = []
    for row in range(x.shape[0]):
        out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
        for _, columns in documents(tokens, row):
            positions = [int(tokens.position[row, column]) for column in columns]
            hidden, _, _ = document(layer, [x[row, column] for column in columns], positions)
            for column, made in zip(columns, hidden):
                out[column] = made
        rows.append(torch.stack(out))
    return torch.stack(rows)


def documents(tokens: Tokens, row: int) -> list[tuple[int, list[int]]]:
    """The columns of each document."""
    valid = [column for column in range(tokens.valid.shape[1]) if tokens.valid[row, column]]
    numbers = sorted({int(tokens.document[row, column]) for column in valid})
    return [(number, [c for c in valid if int(tokens.document[row, c]) == number]) for number in numbers]


def document(layer: Compressive, hidden: list[Tensor], positions: list[int]) -> tuple[list[Tensor], Memory, list]:
    """Outputs, the compressed memory at the end, and for each eviction its queries, states and compressed states."""
    S, M, c, C = layer.segment_length, layer.memory_length, layer.ratio, layer.compressed_length
    memory: Memory = []
    compressed: Memory = []
    out, evictions = [], []
    start = 0
    for segment in range((positions[-1] + 1) // S + 1):
        own = [(p, h) for p, h in zip(positions, hidden) if p // S == segment]
        for p, h in own:
            seen = [(at, key) for at, key in memory + own if at <= p]
            distances = [p - start + start // c - group for group, _ in compressed] + [p - at for at, _ in seen]
            out.append(_token(layer, h, [key for _, key in compressed + seen], distances))
        if positions[-1] < (segment + 1) * S - 1:
            break
        everything = memory + [(p, h.detach()) for p, h in own]
        start = max(0, (segment + 1) * S - M) // c * c
        old = [(p, h) for p, h in everything if p < start]
        memory = [(p, h) for p, h in everything if p >= start]
        if not C:
            continue
        if old:
            lasting = {p: h.detach() for p, h in zip(positions, hidden)}
            new = _compressed(layer, old, [h.detach() for _, h in own], lasting)
            evictions.append(([h.detach() for _, h in own], [h for _, h in old], [z for _, z in new]))
            compressed = compressed + [(group, z.detach()) for group, z in new]
        compressed = [(group, z) for group, z in compressed if group >= start // c - C]
    return out, compressed, evictions


def _compressed(layer: Compressive, old: Memory, queries: list[Tensor], before: dict[int, Tensor]) -> Memory:
    c, function = layer.ratio, layer.compression
    groups = range(old[0][0] // c, old[-1][0] // c + 1)
    states = dict(old)
    if function == "most_used":
        used = sum(_weights(layer, query, [h for _, h in old]).sum(0) for query in queries)
        best = sorted(sorted(range(len(old)), key=lambda index: -used[index].item())[: len(groups)])
        return [(group, old[index][1]) for group, index in zip(groups, best)]
    made = []
    for g in groups:
        if function in ("mean", "max"):
            group = torch.stack([states[g * c + t] for t in range(c)])
            made.append((g, group.mean(0) if function == "mean" else group.amax(0)))
            continue
        step, z = (1 if function == "conv" else 2), layer.compress.conv.bias
        for t in range(c):
            at = g * c + c - 1 - (c - 1 - t) * step
            if at in before:
                z = z + layer.compress.conv.weight[:, :, t] @ before[at]
        made.append((g, z))
    return made


def _weights(layer: Compressive, query: Tensor, keys: list[Tensor]) -> Tensor:
    """[H, keys], without positions."""
    H, D = layer.heads, layer.head_width
    q, k = layer.to_q(query).view(H, D), layer.to_k(torch.stack(keys)).view(-1, H, D)
    return (layer.scale * (q * k).sum(-1)).softmax(0).T


def reconstruction(layer: Compressive, evictions: list, tokens: int) -> Tensor:
    """The squared gap between attention to what was evicted and to what was made of it, for each token of the call."""
    gaps = []
    for queries, old, new in evictions:
        for query in queries:
            for_old, for_new = (
                _weights(layer, query, keys)[:, None]
                @ layer.to_v(torch.stack(keys)).view(-1, layer.heads, layer.head_width).transpose(0, 1)
                for keys in (old, new)
            )
            gaps.append((for_old - for_new).square().mean())
    return torch.stack(gaps).sum() / tokens


def _token(layer: Compressive, h: Tensor, keys: list[Tensor], distances: list[int]) -> Tensor:
    H, D = layer.heads, layer.head_width
    held = torch.stack(keys)
    q = layer.to_q(h).view(H, D)
    k, v = layer.to_k(held).view(-1, H, D), layer.to_v(held).view(-1, H, D)
    r = layer.to_r(_waves(distances, layer.dim).to(h)).view(-1, H, D)
    scores = layer.scale * (((q + layer.u) * k).sum(-1) + ((q + layer.v) * r).sum(-1))
    return layer.to_out((scores.softmax(0)[..., None] * v).sum(0).flatten())
