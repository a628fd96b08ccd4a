"""Short convolution: each channel mixes a token with the few before it. Fu et al. 2023 (H3); So et al. 2021 (Primer).

    y_p = x_p + Σ_j w_j · x_{p-j},  j = 0 .. width-1

It gives every mechanism the previous token alike, which recall tasks need (Arora et al. 2023). Causal also in two-sided
models. "Before" counts valid tokens of the same document, so that padding, holes and packing change nothing.
O(L · width · E). Gated, a layer of its own, it is BaseConv of Arora et al. 2023, "Zoology", and its published code:

    y_p = x_p + (b + Σ_j w_j · x_{p-j}) · (A x_p + c)
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.contract import Layer, Output, Source, Tokens
from attention_zoo.layout.halo import halo
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import behind, chosen, gathered
from attention_zoo.ops.exchange.halo import behind_halo
from attention_zoo.ops.taps import taps
from attention_zoo.options import Positive, checked
from attention_zoo.place import place_of


class Recent(NamedTuple):
    """The last width - 1 inputs of each row: [B, S, E] and their tokens; fillers left, valid right."""

    hidden: Float[Tensor, "B S E"]
    tokens: Tokens


class Convolution(Layer):
    """Depthwise and causal. Subclasses say what is made of the mix.

    Args:
        dim: model width E.
        width: number of taps: the token itself and the width - 1 before it.
    """

    travels = "hidden states of the taps"

    def __init__(self, *, dim: int, width: int):
        super().__init__()
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(width, dim))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def joined(self, x: Float[Tensor, "B L E"], mixed: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        """The output, from the input and its mix."""
        raise NotImplementedError

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
        if tokens is None or (isinstance(tokens, Layout) and tokens.implied and state is None):
            return Output(self.joined(x, self._mix(x, None)))
        tokens = Layout.of(tokens)
        x = tokens.blanked(x)
        if tokens.placement is not None:
            return Output(self.joined(x, self._mix_placed(x, tokens)))
        before = x.new_zeros(x.shape[0], 0, self.dim) if state is None else state.hidden
        hidden = torch.cat([before, x], 1)
        keys = tokens
        if state is not None and before.shape[1]:
            held = Layout.of(state.tokens)
            keys = tokens.plan(("behind", id(held)), lambda: (behind(held, tokens), held))[0]
        mixed = self._mix_valid(hidden, keys)[:, before.shape[1] :]
        new = None
        if state is not None:
            columns, kept = keys.plan(("last", self.width), lambda: self._last(keys))
            new = Recent(hidden if columns is None else gathered(hidden, columns), kept)
        return Output(self.joined(x, mixed), new)

    def _mix_placed(self, x: Tensor, tokens: Layout) -> Tensor:
        """Of a process that has some columns of a sequence, behind those that its first tokens mix with."""
        found = halo(tokens, ("taps", self.width), lambda position: position - self.width + 1, last=self.width - 1)
        x = behind_halo(x, tokens, found, "taps")
        return self._mix_valid(x, found.keys)[:, found.width :]

    def _last(self, keys: Layout) -> tuple[Tensor | None, Layout]:
        """The columns that later tokens mix with, and what they are."""
        valid = keys.host.valid
        # 1 at the newest valid token; without the type, torch.compile's NumPy adds truth values up to one
        after = valid[:, ::-1].cumsum(1, dtype=np.int64)[:, ::-1]
        columns, kept = chosen(keys.host, valid & (after < self.width))
        device = keys.valid.device
        return (None, keys) if columns is None else (tensor_of(columns, device), Layout.known(kept, device))

    def _mix_valid(self, x: Tensor, tokens: Layout) -> Tensor:
        if tokens.dense:
            return self._mix(x, None if tokens.one_document else tokens.document)
        order, back, document = tokens.plan("pushed", lambda: self._pushed(tokens))
        if order is None or back is None:
            return tokens.blanked(self._mix(x, document))
        mixed = self._mix(x.gather(1, order[..., None].expand_as(x)), document)
        return mixed.gather(1, back[..., None].expand_as(x))

    def _pushed(self, tokens: Layout) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Columns in an order in which "the one before" is the column before, the way back, and documents in it.

        None: they are in that order; no row holds two documents (padding is zero, and adds nothing).
        """
        valid, device = tokens.host.valid, tokens.valid.device
        begins = valid & np.concatenate([np.ones_like(valid[:, :1]), ~valid[:, :-1]], 1)
        document = np.where(valid, tokens.host.document, -1)
        order = back = None
        if bool((begins.sum(1) > 1).any()):  # holes: push each row's valid tokens together
            there = np.argsort(valid, axis=1, kind="stable")
            document = np.take_along_axis(document, there, 1)
            order, back = tensor_of(there, device), tensor_of(there.argsort(1), device)
        return order, back, None if tokens.one_document else tensor_of(document, device)

    def _mix(self, x: Tensor, document: Tensor | None) -> Tensor:
        if document is None:
            return taps(x, self.weight)
        mixed = x * self.weight[0]
        for tap in range(1, min(self.width, x.shape[1])):
            foreign = nn.functional.pad(document[:, tap:] != document[:, :-tap], (tap, 0))
            earlier = nn.functional.pad(x[:, :-tap], (0, 0, tap, 0)).masked_fill(foreign[..., None], 0)
            mixed = mixed + earlier * self.weight[tap]
        return mixed


class ShortConvolution(Convolution):
    """The mix is added to the input.

    Args:
        dim, width: see `Convolution`.
    """

    @checked
    def __init__(self, *, dim: Positive, width: Annotated[Positive, Field(title="short_conv")]):
        super().__init__(dim=dim, width=width)

    def joined(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x + mixed


class GatedConvolution(Convolution):
    """The mix times a projection is added to the input.

    Args:
        dim, width: see `Convolution`.
    """

    @checked(prefix="short_conv.")
    def __init__(self, *, dim: Positive, width: Positive = 3):
        super().__init__(dim=dim, width=width)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.gate = nn.Linear(dim, dim)

    def joined(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x + (mixed + self.bias) * self.gate(x)
