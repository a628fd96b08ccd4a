"""Where a module's weights are and of which dtype, whatever stands in the place of its projections."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weights: of the first floating-point tensor that it holds.

    A projection need not have a `weight` that is a tensor: adapters wrap it, pruning and flat parameters of a sharded
    model leave a plain attribute, and what torch quantises holds packed weights alone, which live on the CPU and take
    and give float32.
    """
    held = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    for tensor in chain(module.parameters(), module.buffers(), held):
        if tensor.dtype.is_floating_point:
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32
