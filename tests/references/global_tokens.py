"""Global tokens written in front of each document, one document at a time, through the definition of what is inside."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.model.global_tokens import GlobalTokens
from attention_zoo.testing.numerics import definition


def reference(layer: GlobalTokens, x: Tensor, tokens: Tokens) -> Tensor:
    """Hidden states [B, L, E] of an evaluation call; zeros at padding."""
    inside, extra = definition(layer.inner), layer.embedding  # type: ignore[arg-type]
    out = torch.zeros_like(x.nan_to_num())
    for row in range(len(x)):
        for document in tokens.document[row][tokens.valid[row]].unique().tolist():
            columns = (tokens.valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            text = torch.cat([extra.to(x.dtype), x[row, columns]])[None]
            flags = torch.cat([torch.ones(len(extra), dtype=torch.bool), tokens.is_global[row, columns]])[None]
            hidden = inside(text, Tokens.of(torch.ones_like(flags), flags)).hidden[0, len(extra) :]
            out = out.index_put((torch.tensor(row), columns), hidden)
    return out
