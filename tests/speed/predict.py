"""What a call takes by its definition, on the machine at hand, and what it does take.

    seconds = FLOPs / rate of a matrix product + bytes / rate of a copy + what a call of one token takes

All three are measured in the same process. FLOPs are those of the definition, and bytes those of what a layer must read
and write: what a kernel does beside that is what is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo.contract import Attention
from attention_zoo.measure.flops import attention_flops, count_pairs
from attention_zoo.measure.speed import matmul_rate
from attention_zoo.model.state import state_bytes

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


def seconds(call: Callable[[], object]) -> float:
    """The least of a few calls: what another process takes is never in all of them."""
    call()
    found: list[float] = []
    while len(found) < CALLS and sum(found) < LONG_S:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def timed(setting: Setting) -> float:
    """Seconds of one call."""
    return seconds(work(setting, build(setting)))


@dataclass(frozen=True)
class Machine:
    """What this process reaches right now: FLOPs and bytes a second."""

    flops: float
    bytes: float

    @staticmethod
    def here() -> Machine:
        """Measured, anew each time: a shared machine is another one a minute later."""
        much = torch.zeros(2**26)
        return Machine(matmul_rate(), 2 * much.nbytes / seconds(much.clone))

    def expected(self, setting: Setting) -> float | None:
        """Seconds by the definition; None where the mechanism does not say how many pairs it scores."""
        layer = build(setting)
        length = setting.length // setting.documents or 1
        pairs = count_pairs(layer, length, last_row_only=setting.phase == "step")
        if pairs is None:
            return None
        step, training = setting.phase == "step", setting.phase == "training"
        times = 1 if step else setting.documents
        scores = times * attention_flops(pairs, batch=setting.batch, heads=setting.heads, head_width=setting.width)
        rows = setting.batch * (1 if step else setting.length)
        matrices = sum(each.numel() for each in layer.parameters() if each.ndim == 2)
        flops = 3.5 * scores + 6 * rows * matrices if training else scores + 2 * rows * matrices
        size = 2 if setting.dtype == "bfloat16" else 4
        moved = rows * layer.dim * size * (TENSORS if training else TENSORS // 3) + matrices * size
        if step:
            moved += _state(layer, setting)
        one = timed(replace(setting, batch=1, length=1, padding="none", documents=1, globals=0))
        return flops / self.flops + moved / self.bytes + one


def _state(layer: Attention, setting: Setting) -> int:
    with torch.no_grad():
        x = torch.zeros(1, setting.length, layer.dim, dtype=getattr(torch, setting.dtype))
        return setting.batch * state_bytes(layer(x, state=layer.initial_state(1)).state)
