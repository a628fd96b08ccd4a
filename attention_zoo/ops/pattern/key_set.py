"""One of several sets of keys that a query sees in one softmax."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Anywhere, Reach
from attention_zoo.layout.visible import Visible


class Keys(NamedTuple):
    """One set of keys.

    Fields:
        k, v: [B, K, S, D]; K is the same for all sets.
        layout: of the S columns. Positions count the same tokens as those of the queries: a group of tokens stands
            where its last one does (`layout.pooled.Pooled.ends`). None: they are no tokens (a null key, learned ones),
            and every query sees them, whatever its document.
        reach: which of them a query sees: a contiguous `Band`, or `Anywhere`.
        weight: [B, S], added to the scores: log n of a key that counts for n; default 0.
        seen: ranges of the columns that each query sees, which do not overlap; default what `reach` says.
    """

    k: Float[Tensor, "B K S D"]
    v: Float[Tensor, "B K S D"]
    layout: Layout | None
    reach: Reach = Anywhere(weights="uniform")
    weight: Float[Tensor, "B S"] | None = None
    seen: Visible | None = None
