"""H-Transformer-1D as the paper writes it, but for coarsened queries: a loop over pairs, each with its level.

float64, slow, obvious, differentiable by plain autograd; shares nothing with the layer but its parameters and options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.attention.h_transformer_1d import HTransformer1D
from attention_zoo.contract import Tokens


def level_of(i: int, j: int, block: int) -> int:
    """The smallest level whose blocks of these two positions are the same or neighbours."""
    level = 0
    while abs(i // (block << level) - j // (block << level)) > 1:
        level += 1
    return level


def reference(layer: HTransformer1D, x: Tensor, tokens: Tokens) -> Tensor:
    """What `layer(x, tokens).hidden` must be at valid tokens; zeros at padding."""
    rows = []
    for row in range(x.shape[0]):
        out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
        valid = [column for column in range(x.shape[1]) if tokens.valid[row, column]]
        for document in sorted({int(tokens.document[row, column]) for column in valid}):
            columns = [column for column in valid if int(tokens.document[row, column]) == document]
            at = {int(tokens.position[row, column]): x[row, column] for column in columns}
            means: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (level, group) -> key, value
            own = {j: (layer.to_k(token), layer.to_v(token)) for j, token in at.items()}
            for column in columns:
                i = int(tokens.position[row, column])
                out[column] = _token(layer, layer.to_q(at[i]), i, own, means)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _token(
    layer: HTransformer1D,
    q: Tensor,
    i: int,
    own: dict[int, tuple[Tensor, Tensor]],
    means: dict[tuple[int, int], tuple[Tensor, Tensor]],
) -> Tensor:
    H, K, D = layer.heads, layer.kv_heads, layer.head_width
    seen = []
    for j in own:
        if layer.causal and j > i:
            continue
        level = level_of(i, j, layer.block)
        if (level, j >> level) not in means:
            group = [pair for other, pair in own.items() if other >> level == j >> level]
            k, v = (torch.stack(many).mean(0) for many in zip(*group))
            means[level, j >> level] = k, v
        seen.append(means[level, j >> level])
    k, v = (torch.stack(many).view(-1, K, D).repeat_interleave(H // K, 1) for many in zip(*seen))
    weights = (layer.scale * (q.view(H, D) * k).sum(-1)).softmax(0)
    return layer.to_out((weights[..., None] * v).sum(0).flatten())
