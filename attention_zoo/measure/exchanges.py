"""What travels while something is computed: the timeline of one layer on a sequence that several processes own.

    python -m attention_zoo.measure.exchanges longformer --processes 2 --length 8192 --traces folder

Starts the processes on this machine (gloo, one thread each), runs forward and backward, and prints for each exchange
when its messages were posted, how long operators ran until somebody waited for them, and how long that was. What is
waited for was not hidden. Then the bytes that all processes sent together, for each token of the sequence, and the peak
of tensor bytes of the process that needs most. With a folder, writes a trace of each process, for chrome://tracing or
ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attention_zoo.contract import Attention
from attention_zoo.layout.placement import Placement, zigzag
from attention_zoo.measure.memory import peak_memory
from attention_zoo.model.placed import called
from attention_zoo.registry import build
from attention_zoo.tokens import Tokens

STEPS = 2
"""Forward and backward calls, of which the last is looked at."""


class Exchange(NamedTuple):
    """One exchange; milliseconds.

    Fields:
        name: what, forward or backward.
        posted: when the messages were, since the first event.
        computed: how long operators ran from then until somebody waited.
        waited: for how long.
    """

    name: str
    posted: float
    computed: float
    waited: float


def timeline(layer: Attention, x: Tensor, placement: Placement, trace: Path | None = None) -> list[Exchange]:
    """Of a forward and a backward of this process's columns, the second of two; all processes of the group together.

    Args:
        x: [B, L, E], own columns.
        trace: where to write a chrome trace.
    """
    from torch.profiler import ProfilerActivity, profile  # as in trace.py: slow to import

    def step() -> None:
        _step(layer, x, placement)

    for _ in range(STEPS - 1):
        step()
    dist.barrier(placement.group)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    return exchanges_of(list(found.events()))


def _step(layer: Attention, x: Tensor, placement: Placement) -> None:
    x = x.detach().requires_grad_()
    called(layer, x, placement.own, state=None, source=None, choices=None).hidden.sum().backward()


def exchanges_of(events: list[Any]) -> list[Exchange]:
    """Of a profile's events."""
    start = min((event.time_range.start for event in events), default=0.0)
    own = [event for event in events if event.cpu_parent is None or not event.name.startswith("exchange")]
    operators = [event for event in own if event.name.startswith("aten::") and not event.cpu_children]
    made = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        if not event.name.startswith("exchange: ") or not event.name.endswith(", sent"):
            continue
        name, sent = event.name.removeprefix("exchange: ").removesuffix(", sent"), event.time_range
        waits = [
            other.time_range
            for other in events
            if other.name == f"exchange: {name}, waits" and other.time_range.start >= sent.end
        ]
        wait = min(waits, key=lambda range_: range_.start, default=None)
        if wait is None:
            continue
        busy = sum(
            operator.time_range.elapsed_us()
            for operator in operators
            if sent.end <= operator.time_range.start and operator.time_range.end <= wait.start
        )
        made.append(Exchange(name, (sent.start - start) / 1e3, busy / 1e3, wait.elapsed_us() / 1e3))
    return made


def _work(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes)
    torch.manual_seed(0)
    layer = build(options.backend, dim=options.dim, heads=options.heads, causal=not options.two_sided)
    columns = zigzag(options.length, options.processes) if options.zigzag else None
    placement = Placement.of(Tokens.all_valid(1, options.length), columns=columns)
    x = torch.randn(1, len(placement.columns[rank]), options.dim)
    trace = None if options.traces is None else options.traces / f"process_{rank}.json"
    found = timeline(layer, x, placement, trace)
    counts = torch.tensor([placement.traffic.bytes(way) for way in ("forward", "backward")])
    dist.all_reduce(counts)
    peak = torch.tensor(peak_memory(lambda: _step(layer, x, placement)).peak_bytes)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    for turn in range(options.processes):
        dist.barrier()
        if turn == rank:
            for name, posted, computed, waited in found:
                print(
                    f"process {rank}  {name:24} posted {posted:8.1f} ms, computed {computed:8.1f}, waited {waited:6.1f}"
                )
    if not rank:
        forward, backward = (counts / STEPS / options.length).tolist()
        print(f"bytes sent per token: {forward:.1f} forward, {backward:.1f} backward")
        print(f"peak of a process: {int(peak) / 2**20:.1f} MiB above the start of a call")
    dist.destroy_process_group()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend")
    for name, default in (("processes", 2), ("length", 8192), ("dim", 512), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("two-sided", "zigzag"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--traces", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_work, (folder, options), nprocs=options.processes, start_method="spawn")


if __name__ == "__main__":
    main()
