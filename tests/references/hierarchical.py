"""Hierarchical attention document by document, segment by segment, query by query, written from the paper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.model.hierarchical import Hierarchical


def reference(layer: Hierarchical, x: Tensor, tokens: Tokens) -> Tensor:
    """Hidden states [B, L, E] around one layer; zeros at padding."""
    out = torch.zeros_like(x.nan_to_num())
    for row in range(len(x)):
        for document in tokens.document[row][tokens.valid[row]].unique().tolist():
            columns = (tokens.valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            hidden = of_document(layer, x[row, columns])
            out = out.index_put((torch.tensor(row), columns), hidden)
    return out


def of_document(layer: Hierarchical, text: Tensor) -> Tensor:
    """[n, E] of a whole document's tokens."""
    (inner,) = layer.attentions
    segments = list(text.split(layer.segment_length))
    said, told = [], []
    for number, tokens in enumerate(segments):
        summary = (layer.summary + code(number, layer.dim).to(text.dtype))[None]
        complete = len(tokens) == layer.segment_length
        if not layer.causal:
            both = torch.cat([summary, tokens])
        else:
            both = torch.cat([tokens, summary]) if complete else tokens
        hidden = torch.stack([
            attention(inner, inner, query[None], both[: i + 1] if layer.causal else both)[0]
            for i, query in enumerate(both)
        ])  # fmt: skip
        said.append(hidden)
        told.append(inner.among.norm(both + hidden) if inner.document else None)
    if inner.document:
        said = [hidden + more for hidden, more in zip(said, among(layer, inner, told))]
    out = []
    for hidden, tokens in zip(said, segments):
        out.append(hidden[: len(tokens)] if layer.causal else hidden[1:] + hidden[:1])
    return torch.cat(out)


def among(layer: Hierarchical, inner: Any, told: list[Tensor]) -> list[Tensor]:
    """What the summaries add, for the columns of each segment."""
    more = []
    for number, columns in enumerate(told):
        if not layer.causal:
            summaries = torch.stack([each[0] for each in told])
            answer = attention(inner, inner.among, columns[:1], summaries)
            more.append(torch.cat([answer, torch.zeros_like(columns[1:])]))
            continue
        earlier = [each[-1] for each in told[:number]]  # complete, all of them
        rows = []
        for i, query in enumerate(columns):
            seen = [*earlier, query] if i == layer.segment_length else earlier
            keys = torch.stack(seen) if seen else columns[:0]
            rows.append(attention(inner, inner.among, query[None], keys)[0])
        more.append(torch.stack(rows))
    return more


def attention(inner: Any, project: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """[n, E] of queries that see all of the keys."""
    q, k, v = project.to_q(queries), project.to_k(keys), project.to_v(keys)
    width, group, heads = inner.head_width, inner.heads // inner.kv_heads, []
    for head in range(inner.heads):
        mine, theirs = (slice(h * width, (h + 1) * width) for h in (head, head // group))
        if len(keys):
            weights = (q[:, mine] @ k[:, theirs].T * inner.scale).softmax(-1)
            heads.append(weights @ v[:, theirs])
        else:
            heads.append(torch.zeros_like(q[:, mine]))
    answer: Tensor = project.to_out(torch.cat(heads, -1))
    return answer


def code(number: int, dim: int) -> Tensor:
    """The sinusoidal code of a segment's number: all sines, then all cosines."""
    angles = [number * 10_000 ** (-2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
