"""Which kernel runs a call with relative positions: the facts that they need, each with its sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attention_zoo.layout.kernel import Kernel, triton_reason
from attention_zoo.ops.relative.projections import is_plain


@dataclass(frozen=True)
class RelativeCall:
    """What is to be known of a call.

    Fields:
        queries, keys: how many there are.
        consecutive: whether tokens stand in consecutive columns at consecutive positions.
        projections: whose matrices a kernel may multiply by past these modules, where they are plain.
        wanted: the kernel that was asked for.
        gathered: finds the plan by which keys are gathered segment by segment, or a sentence why there is none. Asked
            only where it matters.
    """

    queries: int
    keys: int
    head_width: int
    device: torch.device
    dtype: torch.dtype
    consecutive: bool = True
    projections: tuple[nn.Module, ...] = ()
    wanted: str = "auto"
    gathered: Callable[[], object] = lambda: None


def _is_few(call: RelativeCall) -> str | None:
    # a query spends D + S where projecting keys spends D·S for all of them
    D, S = call.head_width, call.keys
    if call.queries == 1 or 2 * call.queries * (D + S) <= D * S or call.wanted == "absorbed":
        return None
    return f"it is for few queries: {call.queries} of {call.keys} keys are projected faster"


def _no_gradients(call: RelativeCall) -> str | None:
    return "it gives no gradients" if torch.is_grad_enabled() else None


def _is_plain(call: RelativeCall) -> str | None:
    if all(map(is_plain, call.projections)):
        return None
    return "it multiplies by the matrices of to_k, to_v and to_r, one of which is wrapped, hooked or no nn.Linear"


def _has_triton(call: RelativeCall) -> str | None:
    return triton_reason(call.device)


def _triton_takes(call: RelativeCall) -> str | None:
    if triton_reason(call.device):
        return None
    from attention_zoo.ops.relative.triton import refuse

    return refuse(call.head_width, call.dtype, call.device)


def _consecutive(call: RelativeCall) -> str | None:
    return None if call.consecutive else "columns are not positions here (holes, or forgotten keys)"


def _gathers(call: RelativeCall) -> str | None:
    found = call.gathered()
    return found if isinstance(found, str) else None


def _name(kernel: str) -> Any:
    return lambda call: kernel


KERNELS: tuple[Kernel[RelativeCall], ...] = (
    Kernel("absorbed", _name("absorbed"), (_is_few, _no_gradients, _is_plain), "few queries meet hidden states"),
    Kernel("triton", _name("triton"), (_has_triton, _triton_takes, _consecutive), "one Triton kernel, no chunks"),
    Kernel("shift", _name("shift"), (_consecutive,), "chunks; distances are brought to columns by a view"),
    Kernel("gather", _name("gather"), (), "chunks; distances are gathered, between any positions"),
)
"""Fastest first. The mechanism runs the one that is chosen."""
SEGMENTS: tuple[Kernel[RelativeCall], ...] = (
    KERNELS[0],
    Kernel(
        "triton", _name("triton"), (_has_triton, _triton_takes, _gathers), "each segment a sequence of a Triton kernel"
    ),
    Kernel("segments", _name("segments"), (), "each segment with its keys beside each other"),
)
"""Of mechanisms whose segments see keys that are gathered for them."""
