"""ETC's extra global tokens: learned embeddings at the start of each document that see all and are seen by all.

Ainslie et al. 2020; Zaheer et al. 2020, §2 (BigBird-ETC). A mechanism asks for them by its attribute
`extra_global_tokens`; the skeleton inserts them behind the embeddings and takes them out of the result. They stand at
positions 0 .. count-1 of their document, and the text follows. O(count) further columns for each document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.contract import Layer, Tokens, Unsupported
from attention_zoo.layout.layout import Layout


class ExtraGlobalTokens(nn.Module):
    """Insert before every token that starts a document: in a stream, once.

    Args:
        count: number of tokens.
        dim: model width E.
    """

    def __init__(self, *, count: int, dim: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(count, dim))

    @staticmethod
    def asked_for(layers: Sequence[Layer], dim: int) -> ExtraGlobalTokens | None:
        """As many as the layers ask for, None if none does.

        Raises:
            ValueError: if they ask for different numbers.
            Unsupported: if one asks and another knows no global tokens.
        """
        counts = {count for layer in layers if (count := getattr(layer, "extra_global_tokens", 0))}
        if len(counts) > 1:
            raise ValueError(f"extra_global_tokens must be the same in all layers that ask, got {sorted(counts)}")
        if not counts:
            return None
        for layer in layers:
            name = getattr(layer, "name", type(layer).__name__)
            if layer.abilities.global_tokens == "none":
                raise Unsupported(
                    name, "extra_global_tokens of another layer", "no token can see everything", "longformer or full"
                )
        return ExtraGlobalTokens(count=counts.pop(), dim=dim)

    def insert(
        self, x: Float[Tensor, "B L E"], tokens: Tokens | None
    ) -> tuple[Float[Tensor, "B L2 E"], Tokens, Int[Tensor, "B L"]]:
        """x and its tokens with the extra ones among them, and the column where each column of x went."""
        B, L, E = x.shape
        count = len(self.embedding)
        if tokens is None:
            tokens = Tokens.all_valid(B, L, x.device)
        starts = tokens.valid & (tokens.position == 0)
        before = starts.long().cumsum(1) * count
        columns = torch.arange(L, device=x.device) + before
        width = L + (int(before[:, -1].max()) if B else count)
        # every start reserves the `count` columns before its own
        places = columns[..., None] - count + torch.arange(count, device=x.device)
        row, column, number = (starts[..., None] & (places >= 0)).nonzero(as_tuple=True)
        target = places[row, column, number]

        wide = x.new_zeros(B, width, E).scatter(1, columns[..., None].expand(B, L, E), x)
        wide = wide.index_put((row, target), self.embedding[number].to(x.dtype))

        def spread(field: Tensor, extra: Tensor, filler: int | bool) -> Tensor:
            out = field.new_full((B, width), filler).scatter(1, columns, field)
            return out.index_put((row, target), extra.to(field.dtype))

        yes = torch.ones_like(number, dtype=torch.bool)
        return (
            wide,
            Layout(
                spread(tokens.position + count, number, 0),
                spread(tokens.valid, yes, False),
                spread(tokens.is_global, yes, False),
                spread(tokens.document, tokens.document[row, column], 0),
                spread(tokens.length + count, tokens.length[row, column] + count, 0),
            ),
            columns,
        )

    @staticmethod
    def strip(hidden: Float[Tensor, "B L2 E"], columns: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
        """The columns of the text alone."""
        return hidden.gather(1, columns[..., None].expand(*columns.shape, hidden.shape[-1]))
