"""A kernel of three lines that is none of ours: does Triton's interpreter work at all beside this numpy?"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _count(bound, out):
    total = 0
    for _ in range(tl.load(bound)):
        total += 1
    tl.store(out, total)


@cache
def works() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](torch.tensor([3], dtype=torch.int32), out)
    except InterpreterError:
        return False
    return int(out) == 3
