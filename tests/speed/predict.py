"""What a call takes by its definition, on the machine at hand, and what it does take.

    seconds = FLOPs / rate of products of such widths + exponentials / their rate + bytes / rate of a copy
            + what a call of one token takes + what each turn takes that has to wait for another

All are measured in the same process. FLOPs are those of the definition, an exponential is due for each pair of each
head, and bytes are those of what a layer must read and write: what a kernel does beside that is what is looked for. A
narrow head is multiplied at a fraction of the rate of a square matrix, by whatever code; so it is measured by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo.attention.block_recurrent import BlockRecurrent
from attention_zoo.contract import Attention, Tokens
from attention_zoo.measure.flops import attention_flops, count_pairs
from attention_zoo.model.state import state_bytes
from attention_zoo.model.wrapper import Wrapper

from .setting import Setting, build, work

CALLS, LONG_S = 3, 0.5
TENSORS = 12
"""Of the size of the input that a training call reads and writes at least: queries, keys, values, what they were made
of, the output, and the gradients of all."""


class Moved(TorchDispatchMode):
    """Counts what runs inside: `operators`, and `bytes` that they make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.operators += 1
        if not function.is_view:
            each = found if isinstance(found, (tuple, list)) else (found,)
            self.bytes += sum(one.nbytes for one in each if isinstance(one, Tensor))
        return found


def counted(setting: Setting) -> Moved:
    """Of one call, after one that may make plans."""
    call = work(setting, build(setting))
    call()
    with Moved() as found:
        call()
    return found


def once(call: Callable[[], object]) -> float:
    """Seconds of one call: on one thread those of the processor, which other processes do not lengthen by waiting."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def seconds(call: Callable[[], object]) -> float:
    """The least of a few calls: what another process takes is never in all of them."""
    call()
    found: list[float] = []
    while len(found) < CALLS and sum(found) < LONG_S:
        found.append(once(call))
    return min(found)


def timed(setting: Setting) -> float:
    """Seconds of one call."""
    return seconds(work(setting, build(setting)))


@dataclass(frozen=True)
class Machine:
    """What this process reaches right now: bytes and exponentials a second, and FLOPs by width."""

    bytes: float
    exponentials: float
    rates: dict[tuple[int, ...], float] = field(default_factory=dict)

    @staticmethod
    def here() -> Machine:
        """Measured, anew each time: a shared machine is another one a minute later."""
        much, some = torch.zeros(2**23), torch.zeros(2**18)
        return Machine(2 * much.nbytes / seconds(much.clone), len(some) / seconds(some.exp2_))

    def products(self, *shape: int) -> float:
        """FLOPs a second of [n, m] by [m, k], the worst of these and its transposed shapes, as in backward."""
        if shape not in self.rates:
            n, m, k = shape
            took = [seconds(_product(*each)) for each in ((n, m, k), (n, k, m), (m, n, k))]
            self.rates[shape] = 2 * n * m * k * BATCH / max(took)
        return self.rates[shape]

    def half(self, setting: Setting) -> float:
        """Times as long as in float32 that torch's own layers take in bfloat16: more than 1 without units."""
        width, rows = setting.heads * setting.width, min(setting.tokens, TILE)
        return max(1.0, _linear(rows, width, torch.bfloat16) / _linear(rows, width, torch.float32))

    def expected(self, setting: Setting) -> float | None:
        """Seconds by the definition; None where the mechanism does not say how many pairs it scores."""
        layer = build(setting)
        length = setting.length // setting.documents or 1
        step, training = setting.phase == "step", setting.phase == "training"
        pairs = pairs_of(replace(setting, batch=1, documents=1, length=length, padding="none", globals=0))
        if pairs is None:
            return None
        if not step:
            # products are made of tiles: for fewer keys than a tile holds they take as long as for those
            pairs = max(pairs, length * min(length, TILE) / 2)
        times = 1 if step else setting.documents
        scores = times * attention_flops(pairs, batch=setting.batch, heads=setting.heads, head_width=setting.width)
        rows = setting.batch * (1 if step else setting.length)
        matrices = sum(each.numel() for each in layer.parameters() if each.ndim == 2)
        size, half = (2, self.half(setting)) if setting.dtype == "bfloat16" else (4, 1.0)
        moved = rows * layer.dim * size * (TENSORS if training else TENSORS // 3) + matrices * size
        if step:
            moved += _state(layer, setting)
        return (
            (3.5 if training else 1) * scores / self.products(TILE, setting.width, TILE)
            + (6 if training else 2) * rows * matrices * half / self.products(min(rows, TILE), layer.dim, layer.dim)
            + (2 if training else 1) * times * setting.batch * setting.heads * pairs / self.exponentials
            + moved / self.bytes
            + timed(replace(setting, batch=1, length=1, padding="none", documents=1, globals=0))
            + _waiting(layer, setting)
        )


TILE, BATCH = 64, 4
"""Rows of the products whose rate is measured, and how many are done at once."""


def _product(n: int, m: int, k: int) -> Callable[[], object]:
    """A few products [n, m] by [m, k]."""
    a, b = torch.zeros(BATCH, n, m), torch.zeros(BATCH, m, k)
    out = torch.empty(BATCH, n, k)
    return lambda: torch.bmm(a, b, out=out)


@cache
def _linear(rows: int, width: int, dtype: torch.dtype) -> float:
    """Seconds of a layer, forward and backward."""
    layer, x = torch.nn.Linear(width, width, dtype=dtype), torch.zeros(rows, width, dtype=dtype)
    return seconds(lambda: layer(x).sum().backward())


@cache
def _pairs(name: str, causal: bool, options: tuple[tuple[str, Any], ...], heads: int, length: int, step: bool) -> Any:
    layer = build(Setting(name, heads=heads, width=2, causal=causal, options=dict(options)))
    return count_pairs(layer, length, last_row_only=step)


def pairs_of(setting: Setting) -> float | None:
    """Query-key pairs of a head of one row; of heads so narrow that nothing else takes time."""
    options = tuple(sorted(setting.options.items()))
    found: float | None = _pairs(
        setting.name, setting.causal, options, setting.heads, setting.length, setting.phase == "step"
    )
    return found


def _waiting(layer: Attention, setting: Setting) -> float:
    """Of turns of a recurrence, or calls of what stands inside, that wait for one another: what each takes at least."""
    if setting.phase == "step":
        return 0.0
    small = replace(setting, batch=1, length=1, padding="none", documents=1, globals=0, heads=1, width=16)
    if isinstance(layer, Wrapper):
        return (sum(times for _, times in layer.calls(setting.length)) - 1) * timed(small)
    if not isinstance(layer, BlockRecurrent):
        return 0.0
    small = replace(small, options={"window": 1, "states": 1})
    turn = (timed(replace(small, length=1 + TURNS)) - timed(small)) / TURNS
    return max(0, (setting.length - 1) // layer.window) * max(0.0, turn)


TURNS = 16


def _state(layer: Attention, setting: Setting) -> int:
    with torch.no_grad():
        x = torch.zeros(1, setting.length, layer.dim, dtype=getattr(torch, setting.dtype))
        tokens = Tokens.all_valid(1, setting.length)
        return setting.batch * state_bytes(layer(x, tokens, state=layer.initial_state(1)).state)
