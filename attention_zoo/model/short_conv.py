"""Short convolution: each channel mixes a token with the few before it. Fu et al. 2023 (H3); So et al. 2021 (Primer).

    y_p = x_p + Σ_j w_j · x_{p-j},  j = 0 .. width-1

It gives every mechanism the previous token alike, which recall tasks need (Arora et al. 2023). Causal also in two-sided
models. "Before" counts valid tokens of the same document, so that padding, holes and packing change nothing.
O(L · width · E).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.contract import Layer, Output, Source, Tokens, at_least, keep, place_of


class Recent(NamedTuple):
    """The last width - 1 inputs of each row: [B, S, E] and their tokens; fillers left, valid right."""

    hidden: Float[Tensor, "B S E"]
    tokens: Tokens


class ShortConvolution(Layer):
    """Depthwise and causal, added to its input.

    Args:
        dim: model width E.
        width: number of taps: the token itself and the width - 1 before it.
    """

    def __init__(self, *, dim: int, width: int):
        super().__init__()
        at_least(1, dim=dim, short_conv=width)
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(width, dim))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def initial_state(self, batch_size: int) -> Recent:
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, 0, self.dim, device=device, dtype=dtype)
        return Recent(empty, Tokens.none(batch_size, device))

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Recent | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        if tokens is None:
            return Output(x + self._mix(x, None))
        x = x.masked_fill(~tokens.valid[..., None], 0)
        before = x.new_zeros(x.shape[0], 0, self.dim) if state is None else state.hidden
        hidden = torch.cat([before, x], 1)
        tokens = tokens if state is None else state.tokens.then(tokens)
        mixed = self._mix_valid(hidden, tokens)[:, before.shape[1] :]
        new = None
        if state is not None:
            after = tokens.valid.long().flip(1).cumsum(1).flip(1)  # 1 at the newest valid token
            kept, hidden = keep(tokens.valid & (after < self.width), tokens, hidden)
            new = Recent(hidden, kept)
        return Output(x + mixed, new)

    def _mix_valid(self, x: Tensor, tokens: Tokens) -> Tensor:
        if bool(tokens.valid.all()):
            return self._mix(x, tokens.document)
        # push each row's valid tokens together: then "the one before" is the column before
        order = torch.argsort(tokens.valid.long(), dim=1, stable=True)
        document = torch.where(tokens.valid, tokens.document, -1).gather(1, order)
        mixed = self._mix(x.gather(1, order[..., None].expand_as(x)), document)
        return mixed.gather(1, order.argsort(1)[..., None].expand_as(x))

    def _mix(self, x: Tensor, document: Tensor | None) -> Tensor:
        mixed = x * self.weight[0]
        for tap in range(1, min(self.width, x.shape[1])):
            earlier = nn.functional.pad(x[:, :-tap], (0, 0, tap, 0))
            if document is not None:
                foreign = nn.functional.pad(document[:, tap:] != document[:, :-tap], (tap, 0))
                earlier = earlier.masked_fill(foreign[..., None], 0)
            mixed = mixed + earlier * self.weight[tap]
        return mixed
