"""What a training on a CPU has freed stays with its process, for the next step asks for the same.

By default glibc hands memory back as soon as the end of its heap is free, and tensors of 32 MiB and more whenever they
are. The system gives the pages anew, each filled with zeros first: of a step of 64 rows of 48 tokens (two layers of
width 64) that was a tenth, of scoring rows of 1,024 tokens a quarter. The most that a process holds stays the same.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""
MOST = 2**31 - 1
PAD = 2**24


def keep_freed() -> bool:
    """Whether this process keeps what it frees from now on: only glibc can be told so."""
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tell is None:
        return False
    return all(tell(*each) == 1 for each in ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, MOST), (TOP_PAD, PAD)))
