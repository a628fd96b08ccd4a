"""What relative attention is computed of, in whatever way, and its gradients.

softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class RelativeOperands(NamedTuple):
    """[B, H, n, D] of L queries and S keys; [B, n, H, D] where keys are gathered segment by segment.

    Fields:
        k, v: receive the gradients of all pairs.
        k_own, v_own: the same numbers; receive the gradients of the pairs inside the query's own segment.
        r: keys of the distances 0, 1, ..., as many as the plan says.
        u, w: added to the queries before they meet keys and distances (the paper's u and v).
    """

    q: Float[Tensor, "B H L D"]
    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    k_own: Float[Tensor, "B H S D"]
    v_own: Float[Tensor, "B H S D"]
    r: Float[Tensor, "n H D"]
    u: Float[Tensor, "H D"]
    w: Float[Tensor, "H D"]


def gradients_of(
    likes: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    streams: tuple[Tensor | None, ...],
    dtable: Float[Tensor, "H m D"],
    dq: Tensor,
    du: Float[Tensor, "H D"],
    dw: Float[Tensor, "H D"],
) -> tuple[Tensor | None, ...]:
    """Those of `RelativeOperands`, in the shapes and types of what they are of.

    Args:
        likes: q, k, v, r, u and w.
        streams: of k, v, k_own and v_own; None: not wanted.
        dtable: of the table of distances as chunks.py has it, `falling`, with its spare row: m is one more than r has.
    """
    q, k, v, r, u, w = likes
    dr = dtable[:, :-1].flip(1).transpose(0, 1)
    found = (dq, *streams, dr, du, dw)
    return tuple(
        None if x is None else x.to(like.dtype).view(like.shape) for x, like in zip(found, (q, k, v, k, v, r, u, w))
    )
