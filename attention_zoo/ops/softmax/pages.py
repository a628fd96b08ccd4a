"""Large pages under large results.

Fresh memory costs a page fault every 4 KiB: on a virtual machine 19 ms to fill 32 MiB with zeros, 4 ms in pages of
2 MiB, and attention over 16,384 tokens fills four such results. numpy asks for its large arrays in the same way. What
torch offers instead (THP_MEM_ALLOC_ENABLE) concerns every tensor of the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAGE = 1 << 21
LEAST = 2 * PAGE
"""Smaller tensors are left alone, in bytes."""


def large_pages(x: Tensor) -> Tensor:
    """The same tensor, fresh and not written to yet, on large pages if the system has any to give: a hint to Linux.

    It changes nothing but time; where there is no such hint (other systems, accelerators) or it is refused, nothing.
    """
    size = x.numel() * x.element_size()
    if size >= LEAST and x.is_cpu and sys.platform == "linux" and x.data_ptr():
        start = -(-x.data_ptr() // PAGE) * PAGE
        stop = (x.data_ptr() + size) // PAGE * PAGE
        _madvise()(start, stop - start, mmap.MADV_HUGEPAGE)
    return x


def rows_of(x: Float[Tensor, "n d"], index: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """These rows, without gradients: what steps of many users gather is as large as what a prompt computes."""
    return torch.index_select(x, 0, index, out=large_pages(x.new_empty(len(index), x.shape[1])))


@cache
def _madvise() -> Callable[[int, int, int], int]:
    found = ctypes.CDLL(None).madvise  # Python's own is for its own maps
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
