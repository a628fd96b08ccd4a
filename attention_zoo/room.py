"""Sizes that no machine holds are refused before they are allocated, not ended by the system while weights are drawn.

Linux promises more memory than it has, so that a weight of 200 GB is made without a word and the process dies when it
is filled. While a module is built, what it asks torch for is therefore summed up first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES: frozenset[Callable[..., Any]] = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.randn))
GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
TOLD = 1000
"""A refusal names the whole numbers from here on: one of them is what is too large."""


@cache
def memory_bytes() -> int | None:
    """Main memory of this machine, or what this process's control group may use of it; None where nobody says."""
    known = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in GROUPS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            known.append(int(text))
    return min(known, default=None)


def fits(size: int, what: str) -> None:
    """Raise a ValueError where `size` bytes exceed the memory of this machine; `what` says which options ask for it."""
    most = memory_bytes()
    if most is not None and size > most:
        raise ValueError(f"{what} must fit into memory, {most / 2**30:.0f} GiB, got at least {size / 2**30:,.0f} GiB")


class Room(TorchFunctionMode):
    """While a module is built on the CPU: a ValueError as soon as its tensors together exceed the memory there is.

    On other devices (meta among them) and inside of another one, it counts nothing.

    Args:
        owner: what is built, for the message.
        options: of it, for the message.
    """

    active = False

    def __init__(self, owner: str, options: Mapping[str, Any]):
        super().__init__()
        self.owner, self.options, self.asked = owner, options, 0

    @staticmethod
    def counts() -> bool:
        """Whether tensors that are made now are real ones of this machine's memory."""
        probe = torch.empty(0)
        return type(probe) is torch.Tensor and probe.device.type == "cpu" and not Room.active

    def __enter__(self) -> Room:
        Room.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Room.active = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            self._ask(args, kwargs)
        return func(*args, **kwargs)

    def _ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if str(kwargs.get("device") or "cpu").partition(":")[0] != "cpu":
            return
        size = args[0] if args and isinstance(args[0], tuple | list) else kwargs.get("size", args)
        if not all(isinstance(each, int) for each in size):
            return  # not a size that can be known here: torch says what is wrong with it
        width = (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
        self.asked += math.prod(size) * width
        most = memory_bytes()
        if most is not None and self.asked > most:
            large = {name: value for name, value in self.options.items() if type(value) is int and value >= TOLD}
            given = ", ".join(f"{name}={value}" for name, value in large.items())
            raise ValueError(
                f"{self.owner}: its weights must fit into memory, {most / 2**30:.0f} GiB, got at least "
                f"{self.asked / 2**30:,.0f} GiB{f' with {given}' if given else ''}"
            )
