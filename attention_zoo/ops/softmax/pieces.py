"""Some rows against some keys, a piece at a time, with the log-sum-exp that merges them with others.

What `tiles` is within one tensor of keys, for keys that come one block after the other: sums and gradients are added to
what is there already, and whoever calls decides when all keys have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, fold, partial_backward


class Piece(NamedTuple):
    """Rows of queries and columns of keys.

    Fields:
        bias: makes what is added to their scores, [#B, #H, rows, columns], -inf unseen. None: nothing is.
    """

    rows: slice
    keys: slice
    bias: Callable[[], Tensor] | None = None


def merged(
    out: Float[Tensor, "B H L D"],
    lse: Float[Tensor, "B H L 1"],
    more: Float[Tensor, "B H L D"],
    more_lse: Float[Tensor, "B H L 1"],
) -> None:
    """Two parts of one softmax, the second added to the first in place; of a row that saw nothing the lse is -inf."""
    both = torch.logaddexp(lse, more_lse)
    finite = both.masked_fill(both == -torch.inf, 0)  # -inf - -inf would be NaN
    out.mul_((lse - finite).exp_()).add_(more * (more_lse - finite).exp_())
    lse.copy_(both)


def add_pieces(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    pieces: Sequence[tuple[slice, Sequence[Piece]]],
    *,
    scale: float,
    into: tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L 1"]],
    scratch: Scratch,
) -> None:
    """Attention of rows over their pieces, merged into (output, log-sum-exp) of what they saw before.

    Args:
        pieces: of each run of rows; a row is in one run.
    """
    out, lse = into
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    for rows, some in pieces:
        if not some:
            continue
        query = q[:, :, rows]
        sums, (B, H, n, _) = Sums(query, scratch), query.shape
        for piece in some:
            at = piece.keys
            bias = None if piece.bias is None else piece.bias()
            sums.add(fold(query, k.shape[1]), keys[:, at], values[:, at], bias, scale=scale, shape=(B, H, n))
        merged(out[:, :, rows], lse[:, :, rows], *sums.end())


def add_gradients(
    grad: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    delta: Float[Tensor, "B H L 1"],
    lse: Float[Tensor, "B H L 1"],
    pieces: Sequence[tuple[slice, Sequence[Piece]]],
    *,
    scale: float,
    into: tuple[Float[Tensor, "B H L D"], Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]],
    scratch: Scratch,
) -> None:
    """The pieces' share of the gradients of q, k and v, added to those.

    Args:
        delta: -(grad · merged output), summed over D, and what came for the log-sum-exp itself.
        lse: of all keys together; -inf of rows that saw none.
        into: in float32 at least, contiguous.
    """
    dq, dk, dv = into
    K = k.shape[1]
    keys, values, dkeys, dvalues = (x.flatten(0, 1) for x in (k, v, dk, dv))
    shift = lse.masked_fill(lse == -torch.inf, torch.inf) * -LOG2E
    for rows, some in pieces:
        if not some:
            continue
        given = (grad, q, delta, shift)
        asked = Asked(*(fold(x[:, :, rows], K) for x in given))
        dquery = torch.zeros_like(asked.q, dtype=dq.dtype)
        for piece in some:
            at = piece.keys
            bias = None if piece.bias is None else piece.bias()
            partial_backward(
                asked,
                keys[:, at],
                values[:, at],
                bias,
                scale=scale,
                into=(dquery, dkeys[:, at], dvalues[:, at]),
                shape=(len(q), q.shape[1], len(range(q.shape[2])[rows])),
                scratch=scratch,
            )
        dq[:, :, rows] += dquery.view(dq[:, :, rows].shape)
