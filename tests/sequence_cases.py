"""Sequences that several processes own, against one process: cases, and what a process does with them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.layout.placement import Placement, contiguous, zigzag
from attention_zoo.model.placed import called

LIMIT_S = 180
"""Nobody waits longer for another process."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def plain(length: int) -> Tokens:
    return Tokens.all_valid(2, length)


@dataclass
class Case:
    """One layer on one sequence.

    Fields:
        tokens: of [B, L].
        columns: (L, processes) -> columns of each; default in runs of the same length.
    """

    name: str
    length: int
    options: dict[str, Any] = field(default_factory=dict)
    tokens: Callable[[int], Tokens] = plain
    columns: Callable[[int, int], Any] = contiguous
    dtype: torch.dtype = torch.float64
    width: int = 16
    heads: int = 2

    def __str__(self) -> str:
        said = " ".join(f"{key}={value}" for key, value in self.options.items())
        columns = "" if self.columns is contiguous else f" {self.columns.__name__}"
        return f"{self.name} {said} L={self.length} {self.tokens.__name__}{columns} {self.dtype}"


def padded(length: int) -> Tokens:
    """On the left of one row, on the right and in holes of the other."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    valid[1, length - length // 4 :] = False
    valid[1, 1:length:5] = False
    return Tokens.of(valid)


def marked(length: int) -> Tokens:
    """Global tokens at the start, in the middle and, of one row, near the end; holes."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, length // 2 :: 4] = False
    flags = torch.zeros_like(valid)
    flags[:, 0] = True
    flags[0, length // 2] = True
    flags[1, max(0, length - 3)] = True
    return Tokens.of(valid, flags)


def packed(length: int) -> Tokens:
    """Documents of uneven lengths, other ones in each row, some padding between; one with global tokens."""
    number = torch.arange(length)
    document = torch.stack([number // 7, (number > length // 3).long() + (number > length - 4).long()])
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, 5:length:11] = False
    flags = torch.zeros_like(valid)
    flags[1, length // 3 + 1 : length // 3 + 2] = True
    return Tokens.of(valid, flags, document)


def packed_only(length: int) -> Tokens:
    return packed(length)._replace(is_global=torch.zeros(2, length, dtype=torch.bool))


def uneven(length: int, size: int) -> list[np.ndarray]:
    """The first owns hardly anything, the second nothing at all where there are three or more."""
    borders = [0, min(1, length), *([min(1, length)] if size > 2 else []), length]
    while len(borders) < size + 1:
        borders.insert(-1, (borders[-2] + length) // 2)
    return [np.arange(a, b) for a, b in pairwise(borders)]


def scattered(length: int, size: int) -> list[np.ndarray]:
    """Columns in turn."""
    return [np.arange(rank, length, size) for rank in range(size)]


def build(case: Case) -> Any:
    torch.manual_seed(3)
    layer = zoo.build(case.name, dim=case.width, heads=case.heads, **case.options).to(case.dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias") or "null" in name or name == "sink":
                parameter.normal_(0, 0.3)
            elif name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(2)
    return layer


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    tokens = case.tokens(case.length)
    generator = torch.Generator().manual_seed(5)
    shape = (*tokens.valid.shape, case.width)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for _ in range(2))
    x[~tokens.valid] = torch.nan
    return x, weight, tokens


def ran(layer: Any, x: torch.Tensor, tokens: Tokens, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, gradient of x, gradients of parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = called(layer, x, tokens, state=None, source=None, choices=None)
    loss = (out.hidden * weight).sum() + sum(out.losses.values())
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
    return out.hidden.detach(), x.grad, *found


def differs(case: Case, group: Any = None) -> list[str]:
    """What of the layer on several processes is not what one process has; the same list on all."""
    layer = build(case)
    x, weight, tokens = inputs(case)
    wanted = ran(layer, x, tokens, weight)
    size = dist.get_world_size(group)
    placed = Placement.of(tokens, group, case.columns(case.length, size))
    got = list(ran(layer, placed.take(x), placed.own, placed.take(weight)))
    for gradient in got[2:]:
        dist.all_reduce(gradient, group=group)
    names = ["hidden", "x", *(name for name, _ in layer.named_parameters())]
    by_name, found = dict(zip(names, wanted, strict=True)), []
    largest = max(float(gradient.abs().max()) for gradient in wanted[2:])
    for name, mine, whole in zip(names, got, wanted, strict=True):
        target = placed.take(whole) if name in ("hidden", "x") else whole
        # some gradients are exactly zero (of a bias of keys): what is left of them is rounding of others
        beside = by_name.get(name.replace("bias", "weight"), whole)
        scale = max(float(whole.abs().max()), float(beside.abs().max()), largest / 100, 1e-9)
        error = float((mine - target).abs().max()) / scale if mine.numel() else 0.0
        if not error <= TOLERANCE[case.dtype]:
            found.append(f"{case}: {name} differs by {error:.1e} on process {placed.rank} of {size}")
    return found


def work(rank: int, size: int, path: str, cases: list[Case], checks: list[Callable[[], list[str]]]) -> None:
    """What one process does; what is wrong goes to a file of its own."""
    torch.set_num_threads(1)
    store, limit = f"file://{path}/store", timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    found = []
    try:
        for case in cases:
            found += differs(case)
        for check in checks:
            found += check()
    except Exception:
        found.append(f"process {rank}: {case if cases else ''}\n{traceback.format_exc()}")
    with open(f"{path}/{rank}.txt", "w") as file:
        file.write("\n".join(found))
    dist.barrier()
    dist.destroy_process_group()


BAND = [
    Case("longformer", 23, {"window": 3}),
    Case("longformer", 23, {"window": 3}, padded),
    Case("longformer", 29, {"window": 3, "causal": False}, padded),
    Case("longformer", 31, {"window": 12, "kv_heads": 1, "positions": "rotary"}, packed_only),
    Case("longformer", 23, {"window": 4, "sinks": 2, "positions": "alibi"}, packed_only),
    Case("longformer", 37, {"window": 4, "sinks": 3, "positions": "rotary", "sink_positions": "cache"}),
    Case("longformer", 31, {"window": 2, "dilation": [1, 3], "sink_logit": True}, padded, uneven),
    Case("longformer", 29, {"window": 2, "dilation": 3, "causal": False}, plain, scattered),
    Case("longformer", 23, {"window": 3, "kernel": "dense"}, padded, zigzag),
    Case("longformer", 3, {"window": 2}),
    Case("longformer", 1, {"window": 2}),
    Case("longformer", 41, {"window": 3}, plain, dtype=torch.float32),
    Case("longformer", 23, {"window": 3, "scale": -0.5}, padded),
    Case("longformer", 40, {"window": 3, "scale": 60.0}, padded),
    Case("reformer.local", 41, {"chunk": 4}, packed, zigzag),
    Case("reformer.local", 41, {"chunk": 4, "causal": False}, packed_only, uneven),
    Case("memory_compressed.local", 31, {"block": 4}, padded),
    Case("memory_compressed.local", 31, {"block": 5, "causal": False}, packed_only, uneven),
    Case("adaptive_span", 37, {"limit": 20, "ramp": 3, "start": 6.0}, packed_only),
    Case("adaptive_span", 37, {"limit": 20, "ramp": 3, "start": 4.0, "causal": False, "kv_heads": 1}, padded),
]
GLOBAL = [
    Case("longformer", 29, {"window": 3, "global_projections": "shared"}, marked),
    Case("longformer", 29, {"window": 3}, marked),
    Case("longformer", 31, {"window": 3, "causal": False}, marked, uneven),
    Case("longformer", 31, {"window": 3, "causal": False, "positions": "rotary", "kv_heads": 1}, packed),
    Case("longformer", 31, {"window": 3, "positions": "alibi", "sink_logit": True}, packed, scattered),
    Case("longformer", 31, {"window": 3, "sinks": 2, "scale": 0.0}, packed, zigzag),
    Case("longformer", 29, {"window": 3}, marked, dtype=torch.float32),
    Case("longformer", 3, {"window": 3, "causal": False}, marked),
    Case("longformer", 29, {"window": 3, "kernel": "dense"}, marked),
]
BLOCKS = [
    Case("bigbird", 67, {"block": 4, "random": 1}),
    Case("bigbird", 67, {"block": 4, "random": 2, "causal": False}, padded),
    Case("bigbird", 67, {"block": 4, "random": 1, "causal": False, "kv_heads": 1, "positions": "rotary"}, packed),
    Case("bigbird", 67, {"block": 4, "random": 1}, packed, uneven),
    Case("bigbird", 53, {"block": 4, "random": 1, "positions": "alibi"}, marked, scattered),
    Case("bigbird", 83, {"block": 4, "random": 1, "causal": False, "plan": "reference"}, padded),
    Case("bigbird", 23, {"block": 4, "random": 1, "causal": False, "plan": "reference"}, packed),
    Case("bigbird", 83, {"block": 4, "random": 1, "causal": False, "plan": "reference_eval"}, marked),
    Case("bigbird", 67, {"block": 4, "random": 1, "kv_heads": 2}, padded, heads=4),
    Case("bigbird", 40, {"block": 4, "random": 1, "sink_logit": True}, padded),
    Case("bigbird", 2, {"block": 4, "random": 1}),
    Case("bigbird", 3, {"block": 1, "random": 3, "causal": False, "sink_logit": True}),
    Case("bigbird", 13, {"block": 4, "random": 1, "causal": False, "plan": "reference"}),
    Case("bigbird", 67, {"block": 4, "random": 2}, padded, dtype=torch.float32),
]
RING = [
    Case("full", 23),
    Case("full", 23, {"causal": False}, padded),
    Case("full", 37, {"kv_heads": 1, "positions": "rotary"}, packed, zigzag),
    Case("full", 37, {"positions": "alibi", "sink_logit": True}, padded, zigzag),
    Case("full", 37, {"causal": False, "sink_logit": True}, packed, uneven),
    Case("full", 37, {"scale": -0.4}, marked, scattered),
    Case("full", 3, {}, plain, zigzag),
    Case("full", 1),
    Case("full", 300, {}, padded, zigzag),
    Case("full", 300, {}, packed_only, zigzag, dtype=torch.float32),
    Case("full", 37, {"kernel": "tiles"}, padded),
    Case("full", 40, {"scale": 60.0}, padded, zigzag),
]
GROUPS = [
    Case("memory_compressed", 29, {"compression": 3}),
    Case("memory_compressed", 29, {"compression": 3}, padded),
    Case("memory_compressed", 31, {"compression": 5, "causal": False, "kv_heads": 1}, packed_only, uneven),
    Case("memory_compressed", 31, {"compression": 7}, packed_only, scattered),
    Case("memory_compressed", 41, {"compression": 4, "causal": False}, padded, zigzag),
    Case("memory_compressed", 3, {"compression": 2}),
    Case("memory_compressed", 1, {"compression": 2}),
    Case("memory_compressed", 41, {"compression": 4}, padded, dtype=torch.float32),
    Case("h_transformer_1d", 61, {"block": 2}),
    Case("h_transformer_1d", 61, {"block": 4}, padded),
    Case("h_transformer_1d", 61, {"block": 2, "causal": False, "kv_heads": 1}, packed_only, uneven),
    Case("h_transformer_1d", 45, {"block": 2}, packed_only, scattered),
    Case("h_transformer_1d", 61, {"block": 2, "causal": False}, padded, zigzag),
    Case("h_transformer_1d", 3, {"block": 2}),
    Case("h_transformer_1d", 1, {"block": 2}),
    Case("h_transformer_1d", 61, {"block": 2}, padded, dtype=torch.float32),
]
