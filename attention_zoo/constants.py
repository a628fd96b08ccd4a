"""Tensors that are a function of options alone, such as a slope for each head: made when asked for, and kept.

No module holds them. A buffer outside of the state dict would be left unfilled where a model is built on the meta
device and loaded afterwards, and one inside of it would make options part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn make(*options, device=, dtype=) into get(*options, like=, dtype=), on the device of the tensor `like`.

    The same arguments give the same tensor: do not modify. Options must be hashable.
    """
    kept = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*options: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
        # a fake or traced tensor must not outlive its mode, nor a real one enter it
        found = kept if type(like) is Tensor else make
        with torch.inference_mode(False):  # else it may be born unfit for gradients
            return found(*options, device=like.device, dtype=dtype)

    return get
