"""Tensors that are a function of options alone, such as a slope for each head: plain numbers, filled in when asked for.

No module holds them. A buffer outside of the state dict would be left unfilled where a model is built on the meta
device and loaded afterwards, and one inside of it would make options part of every checkpoint. On CPU no operator is
dispatched for them: the memory is filled from here, so that a first call runs what every later one does, and whatever
mode is on (fake tensors, tracing, transforms) neither sees them nor gets into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


def numbers(make: Callable[[], Tensor]) -> tuple[float, ...]:
    """What torch computes on CPU in float64, as plain numbers, whatever mode a layer is built in."""
    with torch._C._DisableTorchDispatch():
        return tuple(make().tolist())


def constant(values: Sequence[float], *, like: Tensor, dtype: torch.dtype, axes: int = 1) -> Tensor:
    """[n], [n, 1], ...: these numbers, on the device of the tensor `like`. The same arguments give the same tensor.

    Do not modify it. What is narrower than float32 is rounded from there.

    Args:
        axes: how many the tensor has; all but the first are of one element.
    """
    # a fake or traced tensor must not outlive its mode, nor a real one enter it
    found = _made if type(like) is not Tensor or torch.compiler.is_compiling() else _kept
    with torch.inference_mode(False):  # else it may be born unfit for gradients
        return found(tuple(values), like.device, dtype, axes)


def _made(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, axes: int) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.int64
    return torch.tensor(values, dtype=exact, device="cpu").to(device, dtype).view(-1, *[1] * (axes - 1))


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, axes: int) -> Tensor:
    shape = (-1, *[1] * (axes - 1))
    if device.type == "cpu" and dtype in _NUMPY:
        exact = np.array(values, np.float32 if dtype == torch.float16 else None)
        return torch.from_dlpack(exact.astype(_NUMPY[dtype]).reshape(shape))  # from_numpy is an operator to torch
    if device.type == "cpu" and dtype == torch.bfloat16:
        bits = np.array(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, and to even in the middle
        with torch._C._DisableTorchDispatch():
            return torch.frombuffer(rounded.astype(np.uint16), dtype=dtype).view(shape)
    return _made(values, device, dtype, axes)
