"""What it costs: tensor bytes, state bytes and seconds grow with length no faster than declared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from attention_zoo.contract import Attention, Tokens
from attention_zoo.measure.memory import Memory, peak_memory
from attention_zoo.model.state import state_bytes
from attention_zoo.testing.case import Case, piece
from attention_zoo.testing.check import check
from attention_zoo.testing.states import carries

PER_DOUBLING = {"constant": 1.0, "linear": 2.0, "loglinear": 2.2, "quadratic": 4.0}
"""By how much a cost may grow when the length doubles; log-linear: 2 · (1 + 1 / log2 L), 2.2 at 1,024."""
SLACK = 1.1
"""On bytes, which are exact: chunks that are not full yet at the shorter length."""
SLACK_TIME = 1.3
"""On seconds: 2 · 1.3 = 2.6 a doubling for a linear mechanism."""
MOST_BYTES = 600 * 2**20
"""Of forward and backward at 16,384 tokens, 8 heads of width 64, float32, one row, projections included."""


def is_efficient(case: Case) -> bool:
    return case.can.compute != "quadratic"


def step(layer: Attention, length: int) -> Callable[[], None]:
    """Forward and backward of one row, the gradient of x included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, layer.dim, generator=generator).requires_grad_()

    def call() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).hidden.sum().backward()

    return call


@check()
def activations_grow_as_declared(case: Case) -> None:
    """Peak bytes of forward and backward, and the largest single tensor, at 768 and 1,536 tokens.

    From there on: fused kernels change their block sizes below.
    """
    allowed = PER_DOUBLING[case.can.activations] * SLACK
    for causal in case.sides:
        layer = case.build(causal=causal, dtype=torch.float32, tile=128)
        step(layer, 64)()  # whatever is made once is made now
        found = [_peak(step(layer, length)) for length in (768, 1536)]
        for what in ("peak_bytes", "largest_bytes"):
            short, long = (getattr(memory, what) for memory in found)
            assert long <= allowed * short, (
                f"{case.name} causal={causal}: {what} grow {long / short:.2f} times from 768 to 1,536 tokens "
                f"({short:,} to {long:,}), allowed for {case.can.activations} activations: {allowed:.2f}"
            )


def _peak(call: Callable[[], Any]) -> Memory:
    """Without Python's collector, which would free what loops hold at some moment or other."""
    gc.collect()
    gc.disable()
    try:
        return peak_memory(call)
    finally:
        gc.enable()


@check(carries)
def states_grow_as_declared(case: Case) -> None:
    """Bytes of the state after 1,024 and after 8,192 tokens: equal where constant, at most 8 times where linear."""
    layer = case.build(causal=True, dtype=torch.float32, tile=128)
    state, at, found = layer.initial_state(1), 0, {}
    whole = Tokens.all_valid(1, 8192)
    with torch.no_grad():
        for stop in (1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192):
            x = case.data(1, stop - at, dtype=torch.float32)
            state, at = layer(x, piece(whole, at, stop), state=state).state, stop
            found[stop] = state_bytes(state)
    allowed = {"constant": 1.0, "linear": 8.1, "loglinear": 10.5, "quadratic": 64.0}[case.can.state]
    assert found[8192] <= allowed * found[1024], (
        f"{case.name}: the state holds {found[1024]:,} bytes after 1,024 tokens and {found[8192]:,} after 8,192; "
        f"declared {case.can.state}"
    )


@check(is_efficient, slow=True)
def seconds_grow_as_declared(case: Case) -> None:
    """Forward and backward from 8,192 to 16,384 tokens, default options: below 2.6 times (linear).

    Seconds of the processor, of the fastest of several calls at either length, measured on until the bound holds or a
    dozen rounds are spent: other work on the machine can only add to them.
    """
    allowed = PER_DOUBLING[case.can.compute] * SLACK_TIME
    for causal in case.sides:
        layer = case.build(tiny=False, causal=causal, dim=128, heads=2, dtype=torch.float32)
        calls = {length: step(layer, length) for length in (8192, 16384)}
        best = dict.fromkeys(calls, float("inf"))
        for call in calls.values():
            call()
        for spent in range(12):
            for length, call in calls.items():
                start = time.process_time()
                call()
                best[length] = min(best[length], time.process_time() - start)
            if spent and best[16384] < allowed * best[8192]:
                break
        else:
            raise AssertionError(
                f"{case.name} causal={causal}: {best[8192]:.2f} s at 8,192 tokens, {best[16384]:.2f} s at 16,384: "
                f"{best[16384] / best[8192]:.2f} times, allowed {allowed:.2f}"
            )


@check(is_efficient, slow=True)
def memory_at_16k_is_bounded(case: Case) -> None:
    """Forward and backward with 8 heads of width 64 in float32: below 600 MiB, at most 2.3 times a doubling."""
    for causal in case.sides:
        layer = case.build(tiny=False, causal=causal, dim=512, heads=8, dtype=torch.float32)
        short, long = (peak_memory(step(layer, length)).peak_bytes for length in (8192, 16384))
        where = f"{case.name} causal={causal}"
        assert long <= MOST_BYTES, f"{where}: {long / 2**20:.0f} MiB at 16,384 tokens, allowed {MOST_BYTES / 2**20:.0f}"
        assert long <= 2.3 * short, f"{where}: {long / short:.2f} times the bytes from 8,192 to 16,384, allowed 2.3"


@check(slow=True)
def real_widths_at_any_length(case: Case) -> None:
    """dim=512, heads=8 and no other option, at 1, 7, 1,009 and 4,096 tokens: [B, L, E] and finite, both ways."""
    for causal in case.sides:
        layer = case.build(tiny=False, causal=causal, dim=512, heads=8, dtype=torch.float32)
        for length in (1, 7, 1009, 4096):
            x = torch.randn(1, length, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
            out = layer(x).hidden
            out.square().mean().backward()
            where = f"{case.name} causal={causal} at {length} tokens"
            assert out.shape == x.shape, f"{where}: shape {tuple(out.shape)}"
            assert x.grad is not None
            assert bool(out.isfinite().all() & x.grad.isfinite().all()), f"{where}: not finite"
