"""Shortened stacks by loops over documents, levels, groups and tokens; what a stack of one length does is its own."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.contract import Source, Tokens
from attention_zoo.model.level import Level


def reference(stack: Level, x: Tensor, tokens: Tokens) -> Tensor:
    """Hidden states [B, L, E] of an evaluation call; zeros at padding."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for document in tokens.document[row][tokens.valid[row]].unique().tolist():
            columns = (tokens.valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            out = out.index_put((torch.tensor(row), columns), _level(stack, x[row, columns]))
    return out


def _level(stack: torch.nn.Module, x: Tensor, source: Tensor | None = None) -> Tensor:
    """[n, E] -> [n, E] of one document. source: the tokens before they were pooled, where the first keys are theirs."""
    if not isinstance(stack, Level):
        whole = None if source is None else Source(source[None], Tokens.all_valid(1, len(source), x.device))
        return stack(x[None], source=whole).hidden[0]
    k, n = stack.size, len(x)
    h = _level(stack.before, x, source)
    # shifted by k - 1; what the shift moves beyond the end is of a group that nobody reads yet
    shifted = torch.cat([h.new_zeros(k - 1, h.shape[1]), h]) if stack.causal else h
    pooled = []
    for start in range(0, n, k):
        members = list(shifted[start : start + k])
        pooled.append(_pool(stack.pool, members, k, stack.causal))
    y = _level(stack.inside, torch.stack(pooled), h if stack.unpooled else None)
    u = torch.stack([_up(stack.up, h[p], y, p, k, stack.reach, stack.causal) for p in range(n)])
    return _level(stack.after, u)


def _pool(pool, members, k, causal):
    here = len(members)
    if pool.linear is not None:
        filled = members + [torch.zeros_like(members[0])] * (k - here)
        return pool.linear(torch.cat(filled))
    mean = sum(members) / (k if causal else here)
    if pool.over is None:
        return mean
    there = [m for m in members if bool((m != 0).any())] if causal else members
    return mean + _attend(pool.over, mean, there)


def _up(up, x, y, p, k, reach, causal):
    group = p // k
    if up.linear is None:
        own = y[group]
    else:
        width = len(x)
        phase = p % k
        own = up.linear.weight[phase * width : (phase + 1) * width] @ y[group]
        own = own + up.linear.bias[phase * width : (phase + 1) * width]
    out = x + own if up.residual else own
    if up.over is None:
        return out
    last = group if causal else min(len(y) - 1, group + reach - 1)
    return out + _attend(up.over, out, list(y[max(0, group - reach + 1) : last + 1]))


def _attend(over, x, keys):
    """Softmax attention of one vector over a few, head by head."""
    width = len(x) // over.heads
    q = over.query(over.norm(x))
    both = [over.keys(over.norm_keys(key)) for key in keys]
    heads = []
    for head in range(over.heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.stack([q[part] @ each[: len(x)][part] for each in both]) / width**0.5
        weights = scores.softmax(0)
        heads.append(sum(w * each[len(x) :][part] for w, each in zip(weights, both)))
    return over.out(torch.cat(heads))
