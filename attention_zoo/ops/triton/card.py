"""Which launch of a kernel fits the card at hand: by what was compiled for its architecture (`compiled.csv`).

A row of the table is one kernel, compiled for one architecture at one size, with one number of stages of its pipeline;
`python -m attention_zoo.ops.triton.ahead` makes it. A size that is not in it is judged by the next larger one, an
architecture that is not by the newest of those before it. A row of other device code than that at hand (its digest
differs) says nothing of this: it is left out, and where no other is there the kernel is refused, as stale.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any, NamedTuple

import torch

SPILLED = 200
"""Bytes of a thread's stack from which on another number of stages is looked at."""
MANY_ELEMENTS = 8192
"""Elements of a tile from which on a program has eight warps, not four: fewer registers a thread hold them."""


class Compiled(NamedTuple):
    """A row: what was compiled, and what the machine code needs.

    Fields:
        arch: compute capability, 90 for 9.0.
        kernel: its name in `block_...` or `relative_...`, or of one of the passes of it.
        block, width: slots of a block and channels of a head.
        itemsize: bytes of an element: 2 (bfloat16) or 4 (float32).
        causal, gathered: 0 or 1.
        shared: bytes of a program's shared memory.
        registers, stack: of a thread; bytes of stack are registers that did not fit.
        seconds: processor time of the compilation.
        triton: release that compiled it.
        source: digest of the device code (`digest`): of another one, a row is compiled again.
    """

    arch: int
    kernel: str
    block: int
    width: int
    itemsize: int
    causal: int
    gathered: int
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    seconds: float
    triton: str
    source: str

    @property
    def what(self) -> tuple[int | str, ...]:
        """All that was asked for, without what came of it."""
        return self[:9]

    @property
    def launch(self) -> tuple[int | str, ...]:
        """The same whatever the numbers of warps and stages."""
        return self[:7]


def read(lines: Iterable[str]) -> list[Compiled]:
    """Rows of a table."""
    kinds = {"kernel": str, "seconds": float, "triton": str, "source": str}
    return [
        Compiled(**{name: kinds.get(name, int)(text) for name, text in row.items()}) for row in csv.DictReader(lines)
    ]


@cache
def table() -> tuple[Compiled, ...]:
    """The rows that come with the package."""
    with (resources.files(__package__) / "compiled.csv").open() as lines:
        return tuple(read(lines))


SOURCES: dict[str, ModuleType] = {}
"""Where the device code of each family of kernels is, "block" and "relative": whoever launches them says so here."""


@cache
def digest(kernel: Any) -> str:
    """Of the source of a kernel and of all device functions that it calls; interpreted ones are the same."""
    from triton.runtime.jit import KernelInterface  # imported here: a table can be read without triton

    found: dict[str, str] = {}
    waiting = [kernel.fn]
    while waiting:
        function = waiting.pop()
        name = f"{function.__module__}.{function.__name__}"
        if name not in found:
            source = textwrap.dedent(inspect.getsource(function))
            start = re.search(r"^def\s+\w+\s*\(", source, re.MULTILINE)
            assert start is not None
            found[name] = source[start.start() :]  # without decorators
            called = map(function.__globals__.get, function.__code__.co_names)
            waiting += [x.fn for x in called if isinstance(x, KernelInterface)]
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()[:8]


@cache
def _source(name: str) -> str:
    """Digest of the code at hand of a kernel by its name in the table."""
    family, _, function = name.partition("_")
    # the passes for keys and for values alone are one function
    return digest(getattr(SOURCES[family], re.sub("backward_[kv]$", "backward_kv", function)))


class Card(NamedTuple):
    """A GPU: its name, compute capability, and the bytes of shared memory that a program may ask for."""

    name: str
    arch: int
    shared: int


@cache
def _card(index: int) -> Card:
    known = torch.cuda.get_device_properties(index)
    shared = known.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stub has not heard of it
    return Card(known.name, 10 * known.major + known.minor, shared)


def card_of(device: torch.device) -> Card | None:
    """The card, or None where there is none: Triton's interpreter knows no limits."""
    if device.type != "cuda":
        return None
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def warps_for(elements: int) -> int:
    """Warps of a program whose largest tile has so many elements."""
    return 8 if elements >= MANY_ELEMENTS else 4


@cache
def stages_for(kernel: str, block: int, width: int, itemsize: int, card: Card | None) -> int | None:
    """Stages of the pipeline that fit the card: those that spill least, and of equals the most. None: none fit."""
    if card is None:
        return 2
    need = _needs(kernel, block, width, itemsize, card.arch)
    fits = [
        (stack if stack >= SPILLED else 0, -stages) for stages, (shared, stack) in need.items() if shared <= card.shared
    ]
    return -min(fits)[1] if fits else None


def refuse(kernels: Sequence[str], block: int, width: int, itemsize: int, card: Card | None) -> str | None:
    """Why one of these kernels cannot be launched on the card, or None."""
    if card is None:
        return None
    for kernel in kernels:
        if stages_for(kernel, block, width, itemsize, card) is not None:
            continue
        need = _needs(kernel, block, width, itemsize, card.arch)
        size = f"blocks of {block} and heads of width {width}"
        if not need and any(row.kernel == kernel and row.source != _source(kernel) for row in table()):
            return (
                f"what its {kernel} needs for {size} is known of older device code alone (compiled.csv is stale): "
                "run python -m attention_zoo.ops.triton.ahead"
            )
        if not need:
            return f"{size} take too long to compile in float32" if itemsize > 2 else f"it was not compiled for {size}"
        least = min(shared for shared, _ in need.values())
        return f"its {kernel} needs {least:,} bytes of shared memory for {size}, {card.name} has {card.shared:,}"
    return None


@cache
def _needs(kernel: str, block: int, width: int, itemsize: int, arch: int) -> dict[int, tuple[int, int]]:
    """Shared bytes and stack for each number of stages: the most of any variant, at the next size that was compiled."""
    of_this = (row for row in table() if row.kernel == kernel and row.source == _source(kernel))
    rows = [row for row in of_this if row.itemsize == itemsize]
    held = sorted({row.arch for row in rows})
    judge = next((known for known in reversed(held) if known <= arch), held[0] if held else arch)
    larger = [row for row in rows if row.arch == judge and row.block >= block and row.width >= width]
    if not larger:
        return {}
    size = min((row.block * row.width, row.block) for row in larger)
    found: dict[int, tuple[int, int]] = {}
    for row in larger:
        if (row.block * row.width, row.block) == size:
            shared, stack = found.get(row.stages, (0, 0))
            found[row.stages] = max(shared, row.shared), max(stack, row.stack)
    return found
