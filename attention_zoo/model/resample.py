"""k tokens into one, and one into k: what stands between the levels of a shortened stack.

Pooling gets the members of each group [B, G, k, E], with zeros where there are none:

    mean        Σ members / k                           two-sided: over those that are there
    linear      W · [member_1 ... member_k] + b         a convolution with stride k
    attention   m + attention of m over the members     m: their mean

Up-sampling gives each token something of its group's output y:

    repeat      y
    linear      W_j · y + b_j                           for the j-th token that reads the group
    attention   u + attention of u over the groups near it;  u = x + linear: x is the token before shortening

Nawrot et al. 2021, §2.2: Attention(Q = m, K = V = x) and Attention(Q = u, K = V = y), over the whole sequence, at
O(L²/k). Here a group reads its own k tokens, and a token the last `reach` groups (two-sided: as many after, too), so
that what joins two levels costs O(L) and is not what decides how a stack grows. With `reach` no less than the number of
groups up-sampling is the paper's; pooling over all earlier tokens is not here: blocks before have looked at them.
Neither has a feed-forward layer of its own, which the released code adds: blocks follow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from attention_zoo.layout.windows import Windows
from attention_zoo.model.norm import build_norm, refuse_over_batch

POOLS = ("mean", "linear", "attention")
UPS = ("repeat", "linear", "attention")


class Over(nn.Module):
    """Attention of each column over a few vectors of its own, in heads, pre-norm; without the residual."""

    def __init__(self, *, dim: int, heads: int, norm: object):
        super().__init__()
        refuse_over_batch(norm, "shorten with attention between its levels")  # type: ignore[arg-type]
        self.heads = heads
        self.norm, self.norm_keys = build_norm(norm, dim), build_norm(norm, dim)  # type: ignore[arg-type]
        self.query, self.keys, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def project(self, x: Float[Tensor, "... E"]) -> Float[Tensor, "... 2E"]:
        """Keys and values, one beside the other."""
        projected: Tensor = self.keys(self.norm_keys(x))
        return projected

    def forward(
        self, x: Float[Tensor, "B L E"], projected: Float[Tensor, "B L n 2E"], seen: Tensor
    ) -> Float[Tensor, "B L E"]:
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1))
        k, v = (each.unflatten(-1, (self.heads, -1)) for each in projected.chunk(2, -1))
        scores = torch.einsum("blhd,blnhd->blhn", q, k) * q.shape[-1] ** -0.5
        weight = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        out: Tensor = self.out(torch.einsum("blhn,blnhd->blhd", weight, v).flatten(-2))
        return out


class Pool(nn.Module):
    """The first half; see the module.

    Args:
        kind: one of `POOLS`.
        size: k.
    """

    def __init__(self, kind: str, size: int, *, dim: int, heads: int, norm: object):
        super().__init__()
        self.size, self.dim = size, dim
        self.linear = nn.Linear(size * dim, dim) if kind == "linear" else None
        self.over = Over(dim=dim, heads=heads, norm=norm) if kind == "attention" else None

    def forward(self, x: Float[Tensor, "B L E"], before: Tensor | None, at: Windows) -> Float[Tensor, "B G E"]:
        """before: [B, lead, E], the tokens before the call's; None: there are none."""
        members = self._members(x, before, at)
        if self.linear is not None:
            out: Tensor = self.linear(members.flatten(2))
            return out
        mean = members.sum(2) / at.divisor.to(x.dtype)
        if self.over is None:
            return mean
        return mean + self.over(mean, self.over.project(members), at.there)

    def _members(self, x: Tensor, before: Tensor | None, at: Windows) -> Tensor:
        (_, L, _), lead = x.shape, at.last.shape[1]
        if at.plain:
            columns = at.members.shape[1] * self.size
            return pad(x, (0, 0, lead, max(0, columns - L - lead)))[:, :columns].unflatten(1, (-1, self.size))
        return taken(x, before, lead, at.members)


class Up(nn.Module):
    """The second half; see the module.

    Args:
        kind: one of `UPS`.
        size: k.
        residual: whether the token before shortening is added.
    """

    def __init__(self, kind: str, size: int, *, dim: int, heads: int, norm: object, residual: bool = True):
        super().__init__()
        self.size, self.residual = size, residual
        self.linear = None if kind == "repeat" else nn.Linear(dim, size * dim)
        self.over = Over(dim=dim, heads=heads, norm=norm) if kind == "attention" else None

    def forward(
        self, x: Float[Tensor, "B L E"], y: Float[Tensor, "B G E"], before: Tensor | None, at: Windows
    ) -> Float[Tensor, "B L E"]:
        """before: [B, past, E], the groups before the call's; None: there are none."""
        spread = self._spread(y, before, at, x.shape[1])
        out = x + spread if self.residual else spread
        if self.over is None:
            return out
        keys, earlier = self.over.project(y), None if before is None else self.over.project(before.to(y.dtype))
        return out + self.over(out, taken(keys, earlier, at.latest.shape[1], at.near), at.seen)

    def _spread(self, y: Tensor, before: Tensor | None, at: Windows, length: int) -> Tensor:
        (B, _, E), past = y.shape, at.latest.shape[1]
        if at.plain:
            many = y[:, :, None].expand(-1, -1, self.size, -1) if self.linear is None else self.linear(y)
            return many.reshape(B, -1, E)[:, :length]
        if self.linear is None:
            return taken(y, before, past, at.own)
        # of the groups before only the last is anybody's own
        held = y.new_zeros(B, 1, E) if before is None or not past else before[:, -1:].to(y.dtype)
        many = self.linear(torch.cat([held, y], 1)).reshape(B, -1, E)
        index = 1 + (at.own - past) * self.size + at.phase
        return taken(many, None, 0, index.masked_fill(at.own == 0, 0))


def taken(x: Float[Tensor, "B n E"], before: Tensor | None, lead: int, columns: Tensor) -> Float[Tensor, "B ... E"]:
    """Columns of [0 | before | x]; before None: zeros."""
    B, _, E = x.shape
    held = x.new_zeros(B, lead, E) if before is None else before.to(x.dtype)
    whole = torch.cat([x.new_zeros(B, 1, E), held, x], 1)
    start = torch.arange(B, device=x.device) * whole.shape[1]
    flat = (columns + start.view(B, *[1] * (columns.ndim - 1))).reshape(-1)
    return whole.flatten(0, 1).index_select(0, flat).unflatten(0, columns.shape)
