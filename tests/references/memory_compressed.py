"""Memory-compressed attention as the paper writes it: token by token, over groups that are convolved one by one.

float64, slow, obvious, differentiable by plain autograd; shares nothing with the layer but its parameters and options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.attention.memory_compressed import MemoryCompressed
from attention_zoo.contract import Tokens


def reference(layer: MemoryCompressed, x: Tensor, tokens: Tokens) -> Tensor:
    """What `layer(x, tokens).hidden` must be at valid tokens; zeros at padding."""
    rows = []
    for row in range(x.shape[0]):
        out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
        valid = [column for column in range(x.shape[1]) if tokens.valid[row, column]]
        for document in sorted({int(tokens.document[row, column]) for column in valid}):
            columns = [column for column in valid if int(tokens.document[row, column]) == document]
            for column, hidden in zip(columns, _document(layer, [x[row, column] for column in columns])):
                out[column] = hidden
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _document(layer: MemoryCompressed, hidden: list[Tensor]) -> list[Tensor]:
    """Every token over the null and the groups that it sees; a group is (position of its last token, key, value)."""
    c, K, D = layer.compression, layer.kv_heads, layer.head_width
    groups: list[tuple[int, Tensor, Tensor]] = []
    for start in range(0, len(hidden), c):
        members = hidden[start : start + c]
        if len(members) == c or not layer.causal:
            k, v = (_convolved(layer, [project(h) for h in members]) for project in (layer.to_k, layer.to_v))
            groups.append((start + c - 1, k, v))
    out = []
    for i, h in enumerate(hidden):
        seen = [group for group in groups if not layer.causal or group[0] <= i]
        keys = torch.stack([layer.null_key.view(K, D), *(k for _, k, _ in seen)])
        values = torch.stack([layer.null_value.view(K, D), *(v for _, _, v in seen)])
        q, heads = layer.to_q(h).view(layer.heads, D), []
        for head in range(layer.heads):
            mine = head * K // layer.heads
            weights = (layer.scale * (keys[:, mine] @ q[head])).softmax(0)
            heads.append(weights @ values[:, mine])
        out.append(layer.to_out(torch.cat(heads)))
    return out


def _convolved(layer: MemoryCompressed, members: list[Tensor]) -> Tensor:
    """[K, D] of one group; members that are not there count as zeros."""
    K, D = layer.kv_heads, layer.head_width
    weight, total = layer.compress.weight.view(K, D, D, -1), layer.compress.bias.view(K, D)
    for t, member in enumerate(members):
        total = total + torch.einsum("kde,ke->kd", weight[..., t], member.view(K, D))
    return total
