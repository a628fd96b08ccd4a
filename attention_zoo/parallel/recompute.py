"""What a block does in training beside what it computes: keep its activations or not, run compiled or not.

Chen et al. 2016, "Training deep nets with sublinear memory cost": of each block its input is kept, and backward runs it
again. Generators are put back meanwhile, so that dropout and hashes are the same. Names of weights stay, since blocks
are changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_zoo.model.block import Block

RECOMPILATIONS = 8
"""Of one block, for calls of several kinds: torch counts those of all blocks together, whose code is the same."""


def prepare(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Change every block of a model.

    Args:
        recompute: keep no activations within a block.
        compiled: run it through torch.compile.
    """
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    if compiled:
        import torch._dynamo

        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, RECOMPILATIONS * len(blocks))
    for block in blocks:
        if compiled:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if recompute:
            block.forward = partial(_again, block.forward)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
