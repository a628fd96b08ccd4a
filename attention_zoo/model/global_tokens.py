"""Global tokens: learned embeddings at the start of each document that see all and are seen by all. A wrapper.

Ainslie et al. 2020 (ETC); Zaheer et al. 2020, §2 (BigBird-ETC). They are put in before the first block and taken out
after the last. They stand at positions 0 .. count-1 of their document, and the text follows: in a stream they are put
in once. O(count) further columns for each document.

Paper: the global tokens are a sequence of their own, with projections and relative positions of their own.

Released code: ETC's is for TensorFlow alone, and no checkpoint of it is converted here.

Here: columns of the one sequence, which any mechanism with global tokens takes; what projections they go through is
its say. BigBird's option `extra_global_tokens` puts this wrapper around its stack, and has no global blocks then.

Checked: against a loop over documents that writes the tokens in front (tests/references/global_tokens.py), in pieces,
packed and padded, against the whole call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.contract import Abilities, Layer, Output, Source, Tokens, Unsupported, able
from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.model.wrapper import Nested, Wrapper
from attention_zoo.options import Positive


class GlobalTokens(Wrapper):
    """Learned global tokens before every token that starts a document.

    Args:
        inner: what they are for: any mechanism that has global tokens, or a list of such for a stack.
        count: number of tokens.
        shared: the options of `Attention`, for the mechanism inside.
    """

    name = "global_tokens"
    tiny = {"count": 2}
    adds_global_tokens = True

    def __init__(self, *, inner: Any = "full", count: Positive = 4, **shared: Any):
        super().__init__(inner=inner, **shared)
        self.embedding = nn.Parameter(torch.randn(count, self.dim))

    @staticmethod
    def abilities_around(inner: Abilities) -> Abilities:
        if inner.global_tokens == "none":
            raise Unsupported(
                "global_tokens", "a mechanism without global tokens", "no token can see everything",
                able(global_tokens=("any", "first_call")),
            )  # fmt: skip
        return Wrapper.abilities_around(inner)

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Nested | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        x, layout = self.enter(x, tokens, state, source)
        x, wide = insert(x, layout, self.embedding)
        before = None if state is None else state.inner
        out = self.inside(x, wide.layout, state=before, source=source, choices=choices)
        hidden = out.hidden.gather(1, wide.columns[..., None].expand(*wide.columns.shape, out.hidden.shape[-1]))
        return out._replace(hidden=hidden, state=None if state is None else Nested((), out.state))


class Inserted(NamedTuple):
    """Where n tokens go before each start of a document.

    Fields:
        layout: of all columns, the new ones among them.
        columns: [B, L], where each column went.
        row, target, number: of each new token: its place, and which of the n it is.
    """

    layout: Layout
    columns: Int[Tensor, "B L"]
    row: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    number: Int[Tensor, " N"]


# how wide rows become is decided on the host; as torch.compiler.disable, without loading the compiler
@torch._disable_dynamo
def insert(
    x: Float[Tensor, "B L E"], layout: Layout, vectors: Float[Tensor, "n E"]
) -> tuple[Float[Tensor, "B L2 E"], Inserted]:
    """x with n vectors before each start of a document, and where all went."""
    B, L, E = x.shape
    found = layout.plan(("insert", len(vectors)), lambda: _inserted(layout, len(vectors)))
    wide = x.new_zeros(B, found.layout.valid.shape[1], E).scatter(1, found.columns[..., None].expand(B, L, E), x)
    return wide.index_put((found.row, found.target), vectors[found.number].to(x.dtype)), found


def _inserted(layout: Layout, count: int) -> Inserted:
    host, device = layout.host, layout.valid.device
    B, L = host.valid.shape
    starts = host.valid & (host.position == 0)
    before = starts.cumsum(1, dtype=np.int64) * count
    columns = np.arange(L) + before
    width = L + (int(before[:, -1].max()) if B else count)
    # every start reserves the `count` columns before its own
    places = columns[..., None] - count + np.arange(count)
    row, column, number = (starts[..., None] & (places >= 0)).nonzero()
    target = places[row, column, number]

    def spread(field: Array, extra: Array | bool) -> Array:
        out = np.zeros((B, width), field.dtype)
        np.put_along_axis(out, columns, field, 1)
        out[row, target] = extra
        return out

    wide = Host(
        spread(host.position + count, number),
        spread(host.valid, True),
        spread(host.is_global, True),
        spread(host.document, host.document[row, column]),
        spread(host.length + count, host.length[row, column] + count),
    )
    places_of = (tensor_of(each, device) for each in (columns, row, target, number))
    return Inserted(Layout.known(wide, device), *places_of)


def asked_for(layers: Sequence[Layer]) -> int:
    """How many extra global tokens mechanisms ask for by their attribute `extra_global_tokens`, 0 if none does.

    Raises:
        ValueError: if they ask for different numbers.
        Unsupported: if one asks and another knows no global tokens.
    """
    counts = {count for layer in layers if (count := getattr(layer, "extra_global_tokens", 0))}
    if len(counts) > 1:
        raise ValueError(f"extra_global_tokens must be the same in all layers that ask, got {sorted(counts)}")
    for layer in layers if counts else ():
        can = getattr(layer, "abilities", None)
        if can is None or can.global_tokens == "none":
            raise Unsupported(
                getattr(layer, "name", type(layer).__name__), "extra_global_tokens of another layer",
                "no token can see everything", able(global_tokens=("any", "first_call")),
            )  # fmt: skip
    return counts.pop() if counts else 0
