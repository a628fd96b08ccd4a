"""The plan on paper: one sequence of a million tokens and more on several devices, and what breaks first.

Bytes that travel are by formula (parallel/sequence/paper.py), bytes that are held are counted (held.py), seconds are
FLOPs at the rate of matrix products that is stated for a device, times how much longer the mechanism's core took than
its FLOPs at that rate where it was measured: the rows of a clone. What a link and a device can is stated, too, and
shown with the page. Nothing here was run on so many devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attention_zoo.contract import Unsupported
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.transformer import Transformer
from attention_zoo.parallel.sequence.held import Column, column, core_flops
from attention_zoo.parallel.sequence.paper import Known, Sent, Shape, sent
from attention_zoo.registry import available, build, wrappers
from attention_zoo.results.row import Row

ADAM = 8
"""Bytes of a parameter's two moments, in float32."""
MOST_SECONDS = 3600.0
"""Of a step: beyond, time is what breaks."""
BUSY = 0.5
"""Of a device's time: below, waiting is what breaks."""


@dataclass(frozen=True)
class Device:
    """What is stated.

    Fields:
        memory: bytes.
        matmul: FLOPs a second of large matrix products, in the dtype of the plan.
        link: bytes a second that a device sends to another.
    """

    memory: float
    matmul: float
    link: float


class Model(NamedTuple):
    """What is planned: dim, heads, depth, vocab, and rows of a batch."""

    dim: int = 512
    heads: int = 8
    depth: int = 12
    vocab: int = 256
    rows: int = 1


class Cost(NamedTuple):
    """One mechanism at one length on so many devices; bytes of one device, seconds of one step.

    Fields:
        kept: bytes of activations that wait for backward.
        travelling: bytes of what came from others, kept until backward.
        held: all bytes: those, weights with gradients and moments, logits.
        sent_layer, sent: bytes that a device sends for one layer, and in a step, on average.
        computing, linking: seconds.
        busy: share of the time that no device waits for the one before.
        breaks: what does first, and how near it is: 1.0 is the limit.
    """

    kept: float
    travelling: float
    held: float
    sent_layer: float
    sent: float
    computing: float
    linking: float
    busy: float
    breaks: tuple[str, float]

    @property
    def seconds(self) -> float:
        """Of a step, nothing of the link hidden behind computing."""
        return self.computing / self.busy + self.linking


class Mechanism:
    """A model of one mechanism at its default options, and what was counted of it.

    Args:
        name: of a backend.
        slower: how many times longer its core took than its FLOPs at the rate of matrix products; None: not measured.
    """

    def __init__(self, name: str, model: Model, dtype: torch.dtype, slower: float | None):
        self.name, self.model, self.dtype, self.slower = name, model, dtype, slower
        self.built = Transformer(
            attention=name, vocab=model.vocab, dim=model.dim, heads=model.heads, depth=1, causal=True
        ).to(dtype)  # fmt: skip
        self.column: Column | None = None
        self.known: Known = {}
        self.parameters = parameter_count(self.built.embedding) + model.depth * parameter_count(self.built.stack)

    def refused(self) -> str | None:
        """Why there is no plan; None: there is one."""
        try:
            sent(self.built, Shape(1, 1024, 2, self.dtype))
        except Unsupported as refusal:
            return refusal.reason
        return None

    def at(self, length: int, devices: int, device: Device) -> Cost:
        """One step on so many devices; on one nothing is sent, and there is a cost whatever is refused."""
        model, shape = self.model, Shape(self.model.rows, length, devices, self.dtype)
        if self.column is None:
            self.column = column(self.built, self.dtype)
            self.core = core_flops(build(self.name, dim=model.dim, heads=model.heads, causal=True))
        own = model.rows * -(-length // devices)
        layers = sent(self.built, shape, self.known) if devices > 1 else []
        kept = model.depth * own * self.column.kept
        travelling = model.depth * sum(each.held for each in layers)
        weights = self.parameters * (2 * shape.width + ADAM)
        held = kept + travelling + weights + 2 * own * model.vocab * 4
        each_layer = sum(each.bytes for each in layers) / devices
        core = model.depth * model.rows * self.core(length) / devices * (self.slower or 1.0)
        computing = (model.depth * own * self.column.flops + core) / device.matmul
        linking = model.depth * each_layer / device.link
        busy = self._busy(layers, devices, computing * device.matmul / model.depth)
        return Cost(
            kept, travelling, held, each_layer, model.depth * each_layer, computing, linking, busy,
            _breaks(held / device.memory, linking / max(computing, 1e-12), busy, computing / busy + linking),
        )  # fmt: skip

    def _busy(self, layers: Sequence[Sent], devices: int, flops: float) -> float:
        """The share of the time that no device waits for the one before, where one computes so much for a layer."""
        waiting = [each for each in layers if each.waits]
        if not waiting:
            return 1.0
        at_once = layers[0].waits and self.built.stack.travels is None
        lots = min(self.model.rows, 2 * devices) if at_once else self.model.depth
        turn = waiting[0].turn
        share = 1.0 if turn is None else min(1.0, (turn.products + turn.scores * (self.slower or 1.0)) / flops)
        return lots / (lots + (devices - 1) * share)


def _breaks(memory: float, link: float, busy: float, seconds: float) -> tuple[str, float]:
    near = {
        "memory": memory, "the link": link, "waiting for each other": (1 / busy - 1) / (1 / BUSY - 1),
        "time": seconds / MOST_SECONDS,
    }  # fmt: skip
    first = max(near, key=lambda name: near[name])
    return first, near[first]


def slower_by(rows: Iterable[Row]) -> dict[str, tuple[float, Row]]:
    """For each mechanism at its default options: how many times longer than its FLOPs at the machine's rate of matrix
    products its core (or else its layer) took, at the longest length that was measured, by its fastest kernel."""
    found: dict[str, tuple[tuple[bool, int, float], Row]] = {}
    for row in rows:
        told: Mapping[str, Any] = row
        wanted = {"kind": "speed", "phase": "forward_backward", "status": "ok", "causal": True, "device": "cpu"}
        if any(told.get(key) != value for key, value in wanted.items()) or (told.get("config") or {}).get("options"):
            continue
        rate, flops, taken = (told.get(key) for key in ("matmul_flops_per_second", "flops", "seconds"))
        if told.get("variant") not in ("core", "layer") or not (rate and flops and taken):
            continue
        rank = told["variant"] == "core", int(told["length"]), -taken * rate / flops
        name = str(told["backend"])
        if name not in found or rank > found[name][0]:
            found[name] = rank, row
    return {name: (-rank[2], row) for name, (rank, row) in found.items()}


def mechanisms(
    model: Model, dtype: torch.dtype, rows: Iterable[Row], names: Sequence[str] | None = None
) -> list[Mechanism]:
    """Those of these names, by default all that are registered."""
    known = slower_by(rows)
    names = (*available(), *wrappers()) if names is None else names
    return [Mechanism(name, model, dtype, known[name][0] if name in known else None) for name in names]
