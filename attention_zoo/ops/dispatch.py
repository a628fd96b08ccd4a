"""Which kernel runs where, and every reason why another cannot.

A mechanism lists its kernels, fastest first. `auto` takes the first that can run the call exactly; a named one that
cannot raises with its reason and those of all others. Nothing is ever substituted silently.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.contract import Unsupported
from attention_zoo.ops import fused, plans
from attention_zoo.ops.dense import dense
from attention_zoo.ops.pattern_call import PatternCall


class Kernel(NamedTuple):
    """One way to run a pattern.

    Fields:
        name: what `kernel=` takes.
        run: the call -> output [B, H, L, D].
        refuse: the call -> why this kernel cannot run it exactly, or None.
        about: one line for people.
    """

    name: str
    run: Callable[[PatternCall], Tensor]
    refuse: Callable[[PatternCall], str | None]
    about: str


def check_name(backend: str, kernels: Sequence[Kernel], wanted: str) -> None:
    """Refuse at build a kernel that the mechanism does not have."""
    names = ["auto", *(kernel.name for kernel in kernels)]
    if wanted not in names:
        raise Unsupported(backend, f"kernel={wanted}", "it has no such kernel", " or ".join(names))


def choose(backend: str, kernels: Sequence[Kernel], wanted: str, call: PatternCall) -> Kernel:
    """The kernel that runs this call."""
    for kernel in kernels:
        if wanted in ("auto", kernel.name) and kernel.refuse(call) is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason or 'would run'}" for name, reason in explain(kernels, call))
    raise Unsupported(backend, f"kernel={wanted}", reasons, "kernel=auto")


def explain(kernels: Sequence[Kernel], call: PatternCall) -> list[tuple[str, str | None]]:
    """Every kernel, fastest first, with the reason why it cannot run this call, or None."""
    return [(kernel.name, kernel.refuse(call)) for kernel in kernels]


TRITON_DEVICES = ("cuda",)
"""Where our Triton kernels may run; tests add "cpu", where Triton's interpreter runs them."""


def triton_reason(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if device.type in TRITON_DEVICES else f"it runs on CUDA, not on {device.type}"


# --- kernels that any pattern may list -------------------------------------------------------------------------------


def _no_refusal(call: PatternCall) -> str | None:
    return None


def _run_dense(call: PatternCall) -> Tensor:
    out = dense(call.q, call.k, call.v, call.pattern.full_bias(call.queries, call.keys), scale=call.scale)
    out = call.blank(out)
    if call.global_qkv is None or not call.any_global_query:
        return out
    q, k, v = call.global_qkv
    columns, chosen = plans.gather_columns(call.queries, call.queries.is_global & call.queries.valid)
    q = q.gather(2, columns[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    rows = dense(q, k, v, plans.everyone_bias(call, chosen, call.keys), scale=call.scale)
    return plans.put_global_rows(out, call.queries, (columns, rows, chosen))


DENSE = Kernel("dense", _run_dense, _no_refusal, "the definition, L x S materialised: O(L·S) memory")


def _run_tiles(call: PatternCall) -> Tensor:
    return plans.run_local(call, plans.near_tiles(call), call.asked)


TILES = Kernel("tiles", _run_tiles, _no_refusal, "tiles that may matter, any positions; backward recomputes")


def _run_banded(call: PatternCall) -> Tensor:
    return plans.run_local(call, plans.band_tiles(call), call.asked)


def _refuse_banded(call: PatternCall) -> str | None:
    if not call.pattern.shift_invariant or call.pattern.reach is None:
        return "the pattern is no band: it depends on more than the distance"
    if not call.aligned:
        return "columns are not positions here (holes, or forgotten keys)"
    return None


BANDED = Kernel(
    "banded", _run_banded, _refuse_banded, "evenly spaced keys per tile, one mask for all; backward recomputes"
)


MASK = 2**23
"""Most cells of a mask that fused attention is given on a CPU, 32 MiB in float32: for a segment behind its past."""


def _run_sdpa(call: PatternCall) -> Tensor:
    q, k, v = call.q, call.k, call.v
    if _unmasked(call) is not None:
        rows = slice(0, 1 if call.rows_alike else None)
        seen = call.seen(call.queries.cut(slice(None), rows), call.keys.cut(slice(None), rows))
        return call.blank(fused.fused(q, k, v, _mask(seen, q.dtype), scale=call.scale), seen)
    if call.pattern.causal and q.shape[2] > 1:
        # right padding lies in the future of every valid token
        return call.blank(fused.fused(q, k, v, scale=call.scale, causal=True))
    if call.all_valid:
        return call.blank(fused.fused(q, k, v, scale=call.scale))
    seen = call.keys.valid[:, None, None, :]
    return call.blank(fused.fused(q, k, v, _mask(seen, q.dtype), scale=call.scale), seen)


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # a row without any key shows them all, so that its weights are finite
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~(seen | ~seen.any(-1, keepdim=True)), -torch.inf
    )


def _refuse_sdpa(call: PatternCall) -> str | None:
    if reason := fused.refuse(call.q):
        return reason
    if call.has_position_bias:
        return "the position scheme adds to the scores"
    if call.global_qkv is not None and call.any_global_query:
        return "global queries have projections of their own"
    reason = _unmasked(call)
    if reason is None:
        return None
    (B, _, L, _), S = call.q.shape, call.k.shape[2]
    if not call.q.is_cuda and (1 if call.rows_alike else B) * L * S <= MASK:
        return None
    return f"{reason}, and a mask of L x S would be too large"


def _unmasked(call: PatternCall) -> str | None:
    """Why a mask of queries x keys is needed, or None."""
    if not call.one_document:
        return "rows hold several documents"
    if not call.pattern.causal:
        return None
    if not call.own_keys:
        return "queries are not the last tokens of the keys"
    if call.q.shape[2] == 1:
        return None
    if call.q.shape[2] != call.k.shape[2]:
        return "a causal mask with earlier keys is not square"
    return None if call.starts_at_zero else "a causal mask cannot hide padding on the left or in holes"


SDPA = Kernel("sdpa", _run_sdpa, _refuse_sdpa, "torch's fused scaled_dot_product_attention: O(L²) time, O(L) memory")


def _refuse_whole_band(call: PatternCall) -> str | None:
    if not (call.pattern.shift_invariant and call.pattern.unweighted) or not getattr(call.pattern, "contiguous", False):
        return "the pattern is no band without gaps"
    if call.pattern.reach is None or call.k.shape[2] - 1 > call.pattern.reach:
        return "there are keys beyond the window"
    if not call.starts_at_zero:
        return "columns are not positions here (padding on the left, holes, documents, or forgotten keys)"
    return _refuse_sdpa(call)


WHOLE_BAND = Kernel("sdpa", _run_sdpa, _refuse_whole_band, "full attention where the window holds every key: torch's")
