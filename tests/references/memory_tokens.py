"""Memory tokens one document and one segment at a time, through the definition of what is inside."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.model.memory_tokens import MemoryTokens
from attention_zoo.testing.numerics import definition


def reference(layer: MemoryTokens, x: Tensor, tokens: Tokens) -> Tensor:
    """Hidden states [B, L, E] of an evaluation call; zeros at padding."""
    out = torch.zeros_like(x.nan_to_num())
    for row in range(len(x)):
        for document in tokens.document[row][tokens.valid[row]].unique().tolist():
            columns = (tokens.valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            out = out.index_put((torch.tensor(row), columns), _of_document(layer, x[row, columns]))
    return out


def _of_document(layer: MemoryTokens, x: Tensor) -> Tensor:
    """[n, E]: the segments of a document, one after the other."""
    inside, m = definition(layer.inner), layer.count  # type: ignore[arg-type]
    segments = x.split(layer.segment_length)
    memory, hidden = layer.memory.to(x.dtype), []
    for index, segment in enumerate(segments):
        left, k = len(segments) - 1 - index, layer.truncate
        if k is not None and index and left % (k + 1) == k:
            memory = memory.detach()
        after = [memory] if layer.at_end and len(segment) == layer.segment_length else []
        made = inside(torch.cat([memory, segment, *after])[None]).hidden[0]
        hidden.append(made[m : m + len(segment)])
        written = made[-m:] if layer.at_end else made[:m]
        mean, variance = written.mean(-1, keepdim=True), written.var(-1, keepdim=True, unbiased=False)
        memory = (written - mean) / (variance + 1e-5).sqrt()
    return torch.cat(hidden)
