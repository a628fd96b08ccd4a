"""What several processes check together of a sequence that they own: bytes, balance, causality, refusals."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sequence_cases import Case, differs, marked
from sequence_random import a_few_random_ones_are_one, many_random_ones_are_one

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.attention import h_transformer_1d, placed_rows
from attention_zoo.attention import placed as placed_
from attention_zoo.layout import needs as needs_
from attention_zoo.layout.needs import needs
from attention_zoo.layout.placement import Placement, contiguous, zigzag
from attention_zoo.layout.reach import Band
from attention_zoo.measure.exchanges import timeline
from attention_zoo.model.transformer import Transformer
from attention_zoo.ops.exchange import everyone, ring
from attention_zoo.ops.exchange.columns import Pending
from attention_zoo.ops.exchange.messages import Messages
from attention_zoo.ops.hand_over.wire import settle
from attention_zoo.rules import Unsupported

B, HEADS, WIDTH, BYTES = 2, 2, 16, 8
SYSTEM = Path("/proc/self/io")
HEADERS = 1 << 13
"""Bytes that gloo writes besides: 144 a message, and a barrier's."""
SENDERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("longformer", {"window": 64}), ("longformer", {"window": 64, "causal": False}), ("full", {}),
    ("bigbird", {"block": 8, "random": 2}), ("memory_compressed", {}), ("h_transformer_1d", {"block": 8}),
    ("transformer_xl", {"segment_length": 96, "memory_length": 64}),
    ("block_recurrent", {"window": 64, "states": 16, "positions": "rotary"}),
)  # fmt: skip


class Counted(dist.ProcessGroup):
    """A process group that counts what goes through it, by itself."""

    def __init__(self, inner: Any):
        super().__init__(dist.get_rank(inner), dist.get_world_size(inner))
        self.inner, self.bytes, self.messages = inner, 0, 0
        known = dist.distributed_c10d._world
        known.pg_map[self] = ("gloo", None)
        known.pg_group_ranks[self] = {rank: rank for rank in range(self.size())}
        known.pg_names[self] = f"counted{id(self)}"

    def send(self, tensors: Any, to: int, tag: int) -> Any:
        self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        self.messages += 1
        return self.inner.send(tensors, to, tag)

    def recv(self, tensors: Any, source: int, tag: int) -> Any:
        return self.inner.recv(tensors, source, tag)


def layer_of(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return zoo.build(name, dim=WIDTH, heads=HEADS, **options).double()


def run(
    layer: Any, tokens: Tokens, columns: Any = None, group: Any = None, x: Any = None
) -> tuple[Placement, Any, Any]:
    """Forward and backward of one call."""
    placement = Placement.of(tokens, group, columns)
    if x is None:
        x = torch.randn(*tokens.valid.shape, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine = placement.take(x).requires_grad_()
    out = layer(mine, placement.own).hidden
    out.square().sum().backward()
    return placement, out.detach(), mine.grad


def bytes_of_a_window() -> list[str]:
    """A process sends its neighbour the last keys of its run, whatever the length and however many there are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    window, halo = 5, 5 * 2 * WIDTH * BYTES * B  # keys and values of all heads
    found = []
    for length in (64, 256):
        for causal in (True, False):
            counted = Counted(dist.group.WORLD)
            traffic = run(
                layer_of("longformer", window=window, causal=causal), Tokens.all_valid(B, length), None, counted
            )[0].traffic
            ahead, behind = rank < size - 1, rank > 0
            forward = halo * (ahead + (behind and not causal))
            backward = halo * (behind + (ahead and not causal))  # gradients go where keys came from
            said = traffic.bytes("forward"), traffic.bytes("backward"), counted.bytes
            if said != (forward, backward, forward + backward):
                found.append(
                    f"window of {length}, causal={causal}: {said}, not {(forward, backward)} on {rank} of {size}"
                )
    return found


def the_system_counts_the_same() -> list[str]:
    """What the kernel saw each process write to sockets is what it says to have sent, and little beside."""
    if not SYSTEM.is_file():
        return []
    found = []
    for name, options in SENDERS:
        layer = layer_of(name, **options)
        run(layer, Tokens.all_valid(B, 512))  # processes connect when they first meet
        dist.barrier()
        start = written()
        placement = run(layer, Tokens.all_valid(B, 512))[0]
        settle()
        dist.barrier()  # all is gone by then
        system, said = written() - start, placement.traffic.bytes()
        if not said <= system <= 1.02 * said + HEADERS:
            found.append(f"{name} {options}: says {said} bytes, the system {system}")
    return found


def written() -> int:
    """Bytes that this process has written, to files and sockets."""
    return int(next(line for line in SYSTEM.read_text().splitlines() if line.startswith("wchar")).split()[1])


def wide_windows_reach_several() -> list[str]:
    """A halo that is longer than a neighbour's run comes from those behind it, too."""
    size, length, window = dist.get_world_size(), 8 * dist.get_world_size(), 19
    counted = Counted(dist.group.WORLD)
    run(layer_of("longformer", window=window), Tokens.all_valid(B, length), None, counted)
    messages = torch.tensor([counted.messages])
    dist.all_reduce(messages)
    # forward and backward: each process hears from as many behind it as 19 columns are spread over
    wanted = 2 * sum(min(rank, 3) for rank in range(size))
    return [] if int(messages) == wanted else [f"{int(messages)} messages, not {wanted}"]


def nothing_travels_between_documents() -> list[str]:
    """Where documents end with the runs, or a whole run is padding, nobody says anything."""
    size = dist.get_world_size()
    length = 12 * size
    document = (torch.arange(length) // 12).expand(B, -1)
    valid = torch.ones(B, length, dtype=torch.bool)
    found = []
    for name, options in (("longformer", {"window": 5}), ("full", {}), ("bigbird", {"block": 4, "random": 1})):
        for tokens in (Tokens.of(valid, None, document), Tokens.of(torch.arange(length).expand(B, -1) < 12)):
            counted = Counted(dist.group.WORLD)
            run(layer_of(name, **options), tokens, None, counted)
            if counted.bytes or counted.messages:
                found.append(f"{name}: {counted.messages} messages of {counted.bytes} bytes where none is needed")
    return found


def global_tokens_cost_their_number() -> list[str]:
    """Global tokens send their keys and their questions, whatever the length: nobody gathers all keys for them."""
    found, rank, size = [], dist.get_rank(), dist.get_world_size()
    seen = []
    for length in (96, 384):
        flags = torch.zeros(B, length, dtype=torch.bool)
        flags[:, 1] = True
        tokens = Tokens.of(torch.ones_like(flags), flags)
        counted = Counted(dist.group.WORLD)
        traffic = run(layer_of("longformer", window=4, causal=False), tokens, None, counted)[0].traffic
        if counted.bytes != traffic.bytes():
            found.append(f"counter says {traffic.bytes()}, the group {counted.bytes}")
        seen.append(traffic.bytes())
        asked = WIDTH * BYTES * B * (size - 1) * (rank == 0)
        if traffic.sent["global queries", "forward"] != asked:
            found.append(f"questions: {traffic.sent}, not {asked}")
        answered = (WIDTH + HEADS) * BYTES * B * (rank > 0)
        if traffic.sent["global answers", "forward"] != answered:
            found.append(f"answers: {traffic.sent}, not {answered}")
    return found if seen[0] == seen[1] else [*found, f"bytes grow with length: {seen}"]


def groups_cost_their_number() -> list[str]:
    """Of compressed keys 1 / compression of what a process has goes to those who see it; means of levels are few."""
    size, rank, found = dist.get_world_size(), dist.get_rank(), []
    length, c = 24 * size, 4
    traffic = run(layer_of("memory_compressed", compression=c), Tokens.all_valid(B, length))[0].traffic
    wanted = 2 * WIDTH * BYTES * B * (24 // c) * (size - 1 - rank)
    if traffic.bytes("forward") != wanted:
        found.append(f"compressed keys: {traffic.sent}, not {wanted}")
    sent = []
    for length in (64 * size, 256 * size):
        placement = run(layer_of("h_transformer_1d", block=2), Tokens.all_valid(B, length))[0]
        sent.append(placement.traffic.bytes("forward"))
    # two levels more, of at most three blocks each for all others
    if sent[1] - sent[0] > 2 * 3 * 2 * 2 * WIDTH * BYTES * B * (size - 1):
        found.append(f"means: {sent} bytes for four times as many tokens")
    return found


def heads_fetch_their_own() -> list[str]:
    """Heads that see less cost less: spans, and random blocks of each head."""
    size = dist.get_world_size()
    whole = Placement.of(Tokens.all_valid(1, 40 * size))
    band = needs(whole.whole, whole.columns, Band((3, 9)), causal=True, key_heads=2, heads=2)
    wanted = [[43, 49], [40, 40]]
    counts = [each.sum(1).tolist() for each in band]
    found = [] if counts[-1] == wanted[0] and counts[0] == wanted[1] else [f"spans of 3 and 9: {counts}"]
    shared = needs(whole.whole, whole.columns, Band((3, 9)), causal=True, key_heads=1, heads=2)
    return found if shared[-1].sum() == 49 else [*found, f"one key head for both: {shared[-1].sum()}"]


def a_ring_is_balanced() -> list[str]:
    """In zig-zag every process computes as many causal pairs, and in runs of their own the last most."""
    size, length = dist.get_world_size(), 16 * dist.get_world_size()
    pairs = {}
    for name, columns in (("zigzag", zigzag(length, size)), ("contiguous", contiguous(length, size))):
        pairs[name] = [sum(int(column) + 1 for column in each) for each in columns]
    found = [] if len(set(pairs["zigzag"])) == 1 else [f"zig-zag: {pairs}"]
    if max(pairs["contiguous"]) < 1.4 * min(pairs["contiguous"]):
        found.append(f"runs: {pairs}")
    traffic = run(layer_of("full"), Tokens.all_valid(B, length), zigzag(length, size))[0].traffic
    # to each of the others at most all own keys and values; backward those again, and as many gradients
    most = 2 * WIDTH * BYTES * B * (length // size) * (size - 1)
    if not 0 < traffic.bytes("forward") <= most or not traffic.bytes("backward") <= 2 * most:
        found.append(f"a ring sent {traffic.sent}, more than {most}")
    return found


def a_ring_holds_two_blocks() -> list[str]:
    """No tensor of a ring is as large as all keys: the most that a process makes room for is the same at any size."""
    length, size = 64 * dist.get_world_size(), dist.get_world_size()
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor) and each.is_floating_point():
                    largest.append(each.untyped_storage().nbytes())
            return out

    layer = layer_of("full", causal=False)
    placement = Placement.of(Tokens.all_valid(B, length))
    x = torch.randn(B, length // size, WIDTH, dtype=torch.float64, requires_grad=True)
    with Watch():
        layer(x, placement.own).hidden.sum().backward()
    # keys and values of one block; scores of a step are bounded by a constant, here those of all own queries and keys
    block = max(2 * B * (length // size) * WIDTH, B * HEADS * (length // size) ** 2) * BYTES
    return [] if max(largest) <= block else [f"a tensor of {max(largest)} bytes, a block has {block}"]


def the_future_is_not_seen() -> list[str]:
    """What a later process holds changes no bit of an earlier one's output; nor does padding, NaN included."""
    size, rank = dist.get_world_size(), dist.get_rank()
    length, found = 11 * size, []
    tokens = Tokens.all_valid(B, length)
    x = torch.randn(B, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 11 * (size - 1) :] += 100
    for name, options in (
        ("longformer", {"window": 30}),
        ("full", {}),
        ("bigbird", {"block": 4, "random": 1}),
        ("memory_compressed", {}),
        ("h_transformer_1d", {"block": 2}),
    ):
        layer = layer_of(name, **options)
        before, after = (run(layer, tokens, x=each)[1] for each in (x, changed))
        if rank < size - 1 and not torch.equal(before, after):
            found.append(f"{name}: the future is seen on {rank} of {size}")
        if rank == size - 1 and torch.equal(before, after):
            found.append(f"{name}: nothing changed where it should")
    return found


def twice_the_same() -> list[str]:
    """Two runs give the same bits, gradients included."""
    found, tokens = [], Tokens.of(torch.arange(50).expand(B, -1) >= 3)
    for name, options in (
        ("longformer", {"window": 9}),
        ("full", {}),
        ("bigbird", {"block": 4, "random": 1}),
        ("memory_compressed", {}),
        ("h_transformer_1d", {"block": 2}),
    ):
        layer = layer_of(name, **options)
        one, two = (run(layer, tokens) for _ in range(2))
        if not (torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])):
            found.append(f"{name}: two runs differ")
    return found


def checkpointing_says_it_again() -> list[str]:
    """A block that is recomputed in backward fetches again, and has the same gradients."""
    found, tokens = [], Tokens.all_valid(B, 24)
    for name, options in (("longformer", {"window": 9}), ("full", {})):
        layer = layer_of(name, **options)
        placement = Placement.of(tokens)
        x = torch.randn(B, 24, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        grads = []
        for again in (False, True):
            mine = placement.take(x).requires_grad_()
            call = lambda y: layer(y, placement.own).hidden  # noqa: E731, B023
            out = torch.utils.checkpoint.checkpoint(call, mine, use_reentrant=False) if again else call(mine)
            out.square().sum().backward()
            grads.append(mine.grad)
        if not torch.equal(*grads):
            found.append(f"{name}: checkpointing differs")
    return found


def what_cannot_be_is_refused() -> list[str]:
    """By name, before anything is sent."""
    placement = Placement.of(Tokens.all_valid(1, 16))
    x = placement.take(torch.randn(1, 16, WIDTH, dtype=torch.float64))
    size = dist.get_world_size()
    with pytest.raises(Unsupported, match="reformer: a sequence on several processes is not supported"):
        layer_of("reformer")(x, placement.own)
    longformer = layer_of("longformer")
    with pytest.raises(Unsupported, match="state with a sequence on several processes"):
        longformer(x, placement.own, state=longformer.initial_state(1))
    with pytest.raises(Unsupported, match="kernel=sdpa with a sequence on several processes"):
        layer_of("full", kernel="sdpa")(x, placement.own)
    model = Transformer(attention="longformer", vocab=5, dim=WIDTH, depth=1, heads=HEADS)
    with pytest.raises(Unsupported, match="last_only=True: parallel"):
        model(torch.zeros_like(placement.own.position), placement.own, last_only=True)
    with pytest.raises(ValueError, match="columns must give each of 16 columns to one process"):
        Placement.of(Tokens.all_valid(1, 16), None, [np.arange(16)] * size)
    with pytest.raises(ValueError, match="columns must be rising numbers for each of"):
        Placement.of(Tokens.all_valid(1, 16), None, [np.arange(16)])
    assert placed_.RING_KERNELS == ("auto", "tiles")
    return []


def keys_travel_while_rows_are_computed() -> list[str]:
    """Between sending and waiting there are projections and most of the attention, forward and backward."""
    size, rank, found = dist.get_world_size(), dist.get_rank(), []
    placement = Placement.of(Tokens.all_valid(B, 64 * size))
    x = torch.randn(B, 64, WIDTH, dtype=torch.float64)
    said = {each.name: each for each in timeline(layer_of("longformer", window=4), x, placement)}
    for name in ("keys forward", "keys backward"):
        if name not in said or not said[name].computed > 0:
            found.append(f"{name}: nothing is computed meanwhile on {rank} of {size}: {said}")
    cuts = placed_rows.cuts_of(placement.whole, placement.columns[rank], np.arange(64 * size), Band(4), True)
    if cuts is None or cuts.alone.rows != slice(4 if rank else 0, 64):
        found.append(f"rows that need nothing: {cuts}")
    return found


def nothing_is_left_behind() -> list[str]:
    """When a call's graph goes, so do its messages and what they hold; without waiting for a collector."""
    gc.collect()
    gc.disable()
    try:
        for name, options in (("longformer", {"window": 9}), ("full", {}), ("bigbird", {"block": 4, "random": 1})):
            run(layer_of(name, **options), Tokens.all_valid(B, 40))
            with torch.no_grad():
                own = Placement.of(Tokens.all_valid(B, 40)).own
                layer_of(name, **options)(torch.ones(*own.valid.shape, WIDTH, dtype=torch.float64), own)
        left = [each for each in gc.get_objects() if type(each) in (Messages, Pending)]
    finally:
        gc.enable()
    return [f"{len(left)} exchanges are left: {left}"] if left else []


def autocast_is_the_same() -> list[str]:
    """Half precision travels as such, and what comes of it is as near as on one process."""
    found, flags = [], torch.zeros(B, 21, dtype=torch.bool)
    flags[:, 4] = True
    for name, options in (("longformer", {"window": 5}), ("full", {}), ("memory_compressed", {})):
        layer = layer_of(name, **options).float()
        tokens = Tokens.of(torch.ones_like(flags), flags if name == "longformer" else None)
        x = torch.randn(B, 21, WIDTH, generator=torch.Generator().manual_seed(9))
        placement = Placement.of(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = placement.take(layer(x, tokens).hidden)
            got = layer(placement.take(x), placement.own).hidden
        if got.dtype != wanted.dtype or not torch.allclose(got, wanted, rtol=2e-2, atol=2e-2):
            found.append(f"{name}: {got.dtype}, off by {float((got - wanted).abs().max().detach())}")
    return found


def compiled_is_the_same() -> list[str]:
    """`torch.compile` does not lose the placement, which would silently cut the sequence."""
    layer, tokens = layer_of("longformer", window=5), Tokens.all_valid(B, 24)
    x = torch.randn(B, 24, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    placement, wanted, _ = run(layer, tokens, x=x)
    got = torch.compile(layer, backend="eager")(placement.take(x), placement.own).hidden
    return [] if torch.allclose(got, wanted, rtol=0, atol=1e-12) else ["compiled: differs"]


def planted_bugs_are_found() -> list[str]:
    """Cases tell what is wrong: a key too few, gradients that stay away, answers that are not merged."""
    ranges, post, gathering = needs_._ranges, Pending.post, h_transformer_1d.gathering

    def a_key_too_few(whole: Any, back: int, ahead: int, causal: bool) -> Any:
        return ranges(whole, back - 1, ahead, causal)

    def no_gradients(self: Pending, sent: Any, like: Any, counts: Any, direction: str) -> None:
        post(self, [torch.zeros_like(x) if direction == "backward" else x for x in sent], like, counts, direction)

    def mean_of_answers(found: Any, valid: Any, sink: Any) -> Any:
        return found[..., :-1].nan_to_num().mean(1).transpose(1, 2)

    def not_added(going: Any, dk: Any, dv: Any) -> None:
        if going is not None:
            going[0].end()

    def parts_as_wholes(*given: Any, mean: bool) -> Any:
        return gathering(*given, mean=False)

    window = Case("longformer", 23, {"window": 3})
    plants = (
        (needs_, "_ranges", a_key_too_few, window),
        (Pending, "post", no_gradients, window),
        (everyone, "_merged", mean_of_answers, Case("longformer", 29, {"window": 3, "causal": False}, marked)),
        (ring, "_settle", not_added, Case("full", 23)),
        (h_transformer_1d, "gathering", parts_as_wholes, Case("h_transformer_1d", 61, {"block": 2})),
    )
    found = []
    for where, name, bug, case in plants:
        with mock.patch.object(where, name, bug):
            wrong = torch.tensor([len(differs(case))])
        dist.all_reduce(wrong)
        if not int(wrong):
            found.append(f"{case}: nobody notices {name} as {bug.__name__}")
    return found


SLOW_CHECKS = [compiled_is_the_same, planted_bugs_are_found, many_random_ones_are_one]
CHECKS = [
    a_few_random_ones_are_one,
    the_system_counts_the_same,
    autocast_is_the_same,
    nothing_is_left_behind,
    keys_travel_while_rows_are_computed,
    bytes_of_a_window,
    wide_windows_reach_several,
    nothing_travels_between_documents,
    global_tokens_cost_their_number,
    groups_cost_their_number,
    heads_fetch_their_own,
    a_ring_is_balanced,
    a_ring_holds_two_blocks,
    the_future_is_not_seen,
    twice_the_same,
    checkpointing_says_it_again,
    what_cannot_be_is_refused,
]
