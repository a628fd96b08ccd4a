"""What the processes that share the tokens of a row send each other, on paper: bytes by formula, without processes.

For causal models on rows without padding, N processes, L columns, D head width, K key heads, E model width:

    a window          Σ_r min(W, start_r) · 2KD            keys and values before each process's first column
    BigBird's blocks  window, first block, and of P blocks before m own ones, that each link to r of all before them,
                      about P · (1 - (P / (P + m))^r), for each key head
    a ring            ¾ · (N - 1) · L · 2KD                zig-zag; backward that again, and gradients in float32
    groups of c       Σ_r (⌈start_r / c⌉ + groups that a cut before start_r divides) · 2KD
    levels of groups  Σ_r (keys of the block before, on each level the parts of groups in sight that others have) · 2KD
    hidden states     Σ_r (start_r - oldest_r) · E         backward as many where a cut lies within a segment, else none
    taps              Σ_r min(width - 1, start_r) · E
    a handed state    Σ_r bytes(start_r)                   counted of states at two lengths, a line through them
    block_recurrent   a window, and (N - 1) · S vectors    keys without rotation travel besides where there is one

Everything but the links and the line is exact, and tested against what processes send (tests/test_sequence_plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from attention_zoo.attention.bigbird import BigBird
from attention_zoo.attention.block_recurrent import BlockRecurrent
from attention_zoo.attention.block_recurrent_placed import Handed
from attention_zoo.attention.h_transformer_1d import HTransformer1D
from attention_zoo.attention.memory_compressed import MemoryCompressed
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.attention.relative import RelativeAttention
from attention_zoo.contract import Layer, Unsupported
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import needs_everything
from attention_zoo.layout.reach import Band
from attention_zoo.model.level import Level
from attention_zoo.model.placed import OPTION, refuse
from attention_zoo.model.short_conv import Convolution
from attention_zoo.ops.hand_over.tree import flattened
from attention_zoo.ops.hand_over.wire import GRAIN
from attention_zoo.parallel.sequence.batch import borders_for, is_of_rings

LONGEST_COUNTED = 1 << 12
"""Columns of the longest state that is counted."""


@dataclass(frozen=True)
class Shape:
    """Of a call.

    Fields:
        rows, length: B and L.
        processes: N.
        width: bytes of a number.
        dtype: of the model.
    """

    rows: int
    length: int
    processes: int
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.dtype.itemsize


class Turn(NamedTuple):
    """What one process computes of a layer between a state that comes and one that goes: FLOPs, forward and backward.

    Fields:
        products: of projections.
        scores: of scores and weighted values.
    """

    products: float
    scores: float


class Sent(NamedTuple):
    """Bytes that all processes together send for one layer.

    Fields:
        way: need | ring | groups | hidden states | taps | states.
        forward, backward: bytes.
        held: of what comes to the process that gets most: bytes that it keeps until backward.
        waits: whether each process waits for the one before.
        turn: with what it waits; None: with all that the layer computes.
    """

    way: str
    forward: float
    backward: float
    held: float
    waits: bool = False
    turn: Turn | None = None

    @property
    def bytes(self) -> float:
        return self.forward + self.backward


Known = dict[tuple[Layer, int, int], "State"]
"""States that were counted, by layer, rows and columns."""


def sent(model: Any, shape: Shape, known: Known | None = None) -> list[Sent]:
    """For each layer of a causal model that needs more than its own columns, in order.

    Args:
        known: states of these layers, in this dtype, that were counted before; further ones are added.

    Raises:
        Unsupported: where a layer has no way, as running it does; or where there is no formula.
    """
    refuse(model)
    borders = borders_for(model, shape.length, shape.processes)
    zigzag = is_of_rings(model) and shape.length >= 2 * shape.processes
    known = {} if known is None else known
    return list(_sent(model.stack, borders, zigzag, shape, model, known))


def _sent(
    module: nn.Module, borders: list[int], zigzag: bool, shape: Shape, model: Any, known: Known
) -> Iterator[Sent]:
    if isinstance(module, Level) and module.travels is not None:
        counts = [-(-at // module.size) for at in borders]  # of groups, which live with the tokens that open them
        each = module.pool.dim * shape.rows * shape.width
        for reach, starts in ((module.size - 1, borders), (module.reach, counts)):
            yield _halo("taps", [min(reach, at) for at in starts[1:-1]], each)
        inside = replace(shape, length=counts[-1])
        yield from _sent(module.before, borders, zigzag, shape, model, known)
        yield from _sent(module.inside, counts, zigzag, inside, model, known)
        yield from _sent(module.after, borders, zigzag, shape, model, known)
    elif isinstance(module, Layer) and module.travels != "":
        if isinstance(module, BlockRecurrent):
            yield from _of_blocks(module, borders, shape)
        else:
            yield _of_layer(module, borders, zigzag, shape, model, known)
    else:
        for child in module.children():
            yield from _sent(child, borders, zigzag, shape, model, known)


def _of_layer(layer: Any, borders: list[int], zigzag: bool, shape: Shape, model: Any, known: Known) -> Sent:
    starts, vector = borders[1:-1], shape.rows * shape.width
    if isinstance(layer, Convolution):
        return _halo("taps", [min(layer.width - 1, at) for at in starts], layer.dim * vector)
    if isinstance(layer, RelativeAttention):
        oldest = [max(0, int(layer._oldest_needed(np.array([at]))[0])) for at in starts]
        found = _halo("hidden states", [at - old for at, old in zip(starts, oldest)], layer.dim * vector)
        within = any(at % layer.segment_length for at in starts)
        return found if within else found._replace(backward=0.0)
    if layer.travels is None:
        return _handed(layer, starts, shape, known, at_once=layer is not model.stack)
    if not getattr(layer, "causal", False):
        raise Unsupported(str(layer.name), "causal=False on paper", "formulas are of causal models", "causal=True")
    keys = 2 * layer.head_width * vector
    if isinstance(layer, MemoryCompressed):
        return _halo("groups", _parts_of_groups(starts, layer.compression), layer.kv_heads * keys)
    if isinstance(layer, HTransformer1D):
        return _halo("groups", _of_levels(layer, borders), layer.kv_heads * keys)
    if isinstance(layer, BigBird) and layer.plan == "uniform" and not layer.extra_global_tokens:
        return _halo("need", _linked(layer, borders), layer.kv_heads * keys)
    if isinstance(layer, PatternAttention) and needs_everything(layer.reach):
        return _ring(shape, layer.kv_heads * keys, zigzag, borders)
    if isinstance(layer, PatternAttention) and isinstance(layer.reach, Band):
        return _halo("need", _banded(layer, layer.reach, starts), keys)
    raise Unsupported(str(layer.name), f"{OPTION} on paper", "no formula says what it sends", "a run, which counts it")


def _of_blocks(layer: BlockRecurrent, borders: list[int], shape: Shape) -> Iterator[Sent]:
    """Keys of the window, and the state that goes on."""
    starts, tensors = borders[1:-1], 3 if layer.local.rotates else 2
    each = tensors * layer.kv_heads * layer.head_width * shape.rows * shape.width
    yield _halo("need", [min(layer.window, at) for at in starts], each)
    tensor, codes = flattened(Handed(layer.initial_state(shape.rows).vectors))
    state = sum(map(_room, tensor))
    forward, count = state + 8 * (len(codes) + 1), len(starts)
    S, E, D, out = layer.states, layer.dim, layer.head_width, 1 if layer.gate == "fixed" else 3
    blocks = shape.rows * shape.length / shape.processes / layer.window
    # of each vector: keys, values, queries of two kinds, and what is made of what it found
    projected = 2 * E * D * (2 * layer.kv_heads + 2 * layer.heads) + 2 * 2 * layer.heads * D * E * out
    turn = Turn(3.0 * blocks * S * projected, 3.0 * blocks * S * 4 * layer.heads * D * (S + layer.window))
    yield Sent("states", count * forward, count * state, forward if count else 0.0, waits=True, turn=turn)


def _halo(way: str, columns: list[float] | list[int], each: int) -> Sent:
    """Columns that come to each process, with their gradients back."""
    total = float(sum(columns)) * each
    return Sent(way, total, total, float(max(columns, default=0)) * each)


def _banded(layer: PatternAttention, band: Band, starts: list[int]) -> list[int]:
    """Of all key heads."""
    back = np.broadcast_to(np.asarray(band.back) * np.asarray(band.stride), (layer.heads,))
    by_key_head = back.reshape(layer.kv_heads, -1).max(1)
    if len(set(by_key_head.tolist())) == 1:
        return [layer.kv_heads * _seen_before(at, int(by_key_head[0]), band.first) for at in starts]
    return [sum(_seen_before(at, int(each), band.first) for each in by_key_head) for at in starts]


def _seen_before(start: int, back: int, first: int) -> int:
    near = min(back, start)
    return near + min(first, start - near)


def _parts_of_groups(starts: list[int], size: int) -> list[int]:
    """That come to each process: a group is in parts where it is cut."""
    return [-(-at // size) + sum(bool(cut % size) for cut in starts[:r]) for r, at in enumerate(starts)]


def _of_levels(layer: HTransformer1D, borders: list[int]) -> list[int]:
    """Keys near each process's first column, and parts of groups of all levels."""
    cuts, block, half = np.asarray(borders), layer.block, layer.block // 2
    levels = max(0, ((borders[-1] - 1) // block).bit_length() - 1)
    found = []
    for r, (start, stop) in list(enumerate(pairwise(borders)))[1:]:
        count = start - max(0, start // block * block - block)
        for level in range(1, levels + 1):
            size = half << level
            # of queries farther behind the cut nothing reaches before it
            fine = np.arange(start // size, min((stop - 1) // size, start // size + 4) + 1)
            low, high = ((fine // 2 - 1) * block).clip(min=0), (fine - 1) * half
            groups = np.unique(np.concatenate([np.arange(a, max(a, b)) for a, b in zip(low, high)]))
            ends = np.minimum((groups + 1) << level, borders[-1]) - 1
            first, last = (np.searchsorted(cuts, at, side="right") - 1 for at in (groups << level, ends))
            count += int((last - first + 1 - ((first <= r) & (r <= last))).sum())
        found.append(count)
    return found


def _linked(layer: BigBird, borders: list[int]) -> list[float]:
    """Columns before each process, by expectation."""
    found = []
    for start, stop in list(pairwise(borders))[1:]:
        before, own = start / layer.block, (stop - start) / layer.block
        always = min(before, layer.side + 1)
        drawn = max(0.0, before - always)
        links = layer.random * layer.heads / layer.kv_heads
        found.append(layer.block * (always + drawn * (1 - (before / (before + own)) ** links)))
    return found


def _ring(shape: Shape, keys: int, zigzag: bool, borders: list[int]) -> Sent:
    N, L = shape.processes, shape.length
    columns = 0.75 * (N - 1) * L if zigzag else float(sum(borders[1:-1]))
    exact = max(shape.width, 4) / shape.width
    # the own block and the next: a ring never holds more
    return Sent("ring", columns * keys, columns * keys * (1 + exact), 2.0 * L / N * keys)


# --- states ----------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Bytes of a state after some columns: sent forward, and of its gradients backward."""

    forward: int
    backward: int


def _handed(layer: Layer, starts: list[int], shape: Shape, known: Known, *, at_once: bool) -> Sent:
    """Each process's state to the next."""
    lots = 1 if at_once else min(shape.rows, 2 * shape.processes)
    rows = -(-shape.rows // lots)
    line = _line(layer, rows, shape.dtype, max(starts, default=0), known)
    states = [line(at) for at in starts]
    count = shape.rows / rows
    return Sent(
        "states", count * sum(x.forward for x in states), count * sum(x.backward for x in states),
        count * max((x.forward for x in states), default=0), waits=True,
    )  # fmt: skip


def _line(layer: Layer, rows: int, dtype: torch.dtype, farthest: int, known: Known) -> Callable[[int], State]:
    """State bytes by the number of columns before: counted where that is short, else on the line through two counts."""

    def counted(columns: int) -> State:
        key = layer, rows, columns
        if key not in known:
            known[key] = state_bytes(layer, rows, columns, dtype)
        return known[key]

    if farthest <= LONGEST_COUNTED:
        return counted
    low, high = LONGEST_COUNTED // 2, LONGEST_COUNTED

    def at(columns: int) -> State:
        pairs = zip(counted(low), counted(high))
        return State(*(round(a + (b - a) * (columns - low) / (high - low)) for a, b in pairs))

    return at


def state_bytes(layer: Layer, rows: int, columns: int, dtype: torch.dtype) -> State:
    """What is sent of a layer's state after so many columns, and of its gradients: counted of a call."""
    width: Any = next(module.dim for module in layer.modules() if hasattr(module, "dim"))
    with torch.enable_grad():
        x = torch.randn(rows, columns, width, dtype=dtype, requires_grad=True)
        state = layer(x, Layout.plain(rows, columns), state=layer.initial_state(rows)).state
    tensors, codes = flattened(state)
    return State(
        sum(map(_room, tensors)) + 8 * (len(codes) + 1), sum(_room(each) for each in tensors if each.requires_grad)
    )


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // GRAIN) * GRAIN
