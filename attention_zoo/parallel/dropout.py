"""Dropout whose masks differ by process, while everything else that is drawn stays the same in all of them.

Whatever a mechanism draws in training (hashes of LSH) is one draw for the whole batch: the generators of all processes
walk in step, as that of one process does. A mask belongs to rows, so each process makes its own, from one number of
the common generator and its rank. What restores that generator (checkpointing, reversible stacks, a run that goes on)
hence restores the masks, and no generator but the common one has a state to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.ops.dropout import dropped

STRIDE = 0x9E3779B97F4A7C15
"""An odd number without a pattern in its bits: ranks' seeds lie far apart."""


class RankDropout(nn.Dropout):
    """`nn.Dropout` for one process of several.

    Args:
        p: probability to drop.
        rank: of this process among those that share the rows.
    """

    def __init__(self, p: float, rank: int):
        super().__init__(p)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        return _dropped(x, self.p, self.rank) if self.training and self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}, rank={self.rank}"


@torch._disable_dynamo  # the seed is a number of the host
def _dropped(x: Tensor, p: float, rank: int) -> Tensor:
    # of the CPU's generator on every device: to read it back makes nobody wait
    common = int(torch.empty((), dtype=torch.int64).random_())
    own = torch.Generator(x.device).manual_seed((common + rank * STRIDE) % 2**63)
    return dropped(x, p, own)


def by_rank(model: nn.Module, rank: int) -> None:
    """Every dropout of a model becomes one whose masks are this process's own."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.Dropout) and not isinstance(part, RankDropout):
                made = RankDropout(part.p, rank)
                made.train(part.training)
                setattr(module, name, made)
