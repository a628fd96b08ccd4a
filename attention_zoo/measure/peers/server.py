"""The process that forks contenders: `python -m attention_zoo.measure.peers.server`, in the environment of a peer.

It imports and does nothing else, so that a contender starts fresh and yet at once. Spoken in lines of JSON. On stdin:
{"fork": what `_contend` takes, "socket": path} is answered by {"pid"}, {"wait": pid} by {"exit": code or minus the
signal}. A contender says what it has to say over the socket.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from contextlib import nullcontext, suppress
from importlib import metadata
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # which the first backward would import

from attention_zoo.contract import Attention, Unsupported
from attention_zoo.measure.cell import SpeedCell, analytic_flops, ending, one_line
from attention_zoo.measure.flops import LinearFlops
from attention_zoo.measure.memory import ResidentPeak, peak_memory
from attention_zoo.measure.peers.table import PEERS
from attention_zoo.measure.speed import clock, matmul_rate
from attention_zoo.measure.work import Work, prepare
from attention_zoo.measure.worker import limit_memory

WARM_LENGTH = 1024
"""Tokens of the call that wakes libraries and threads before the clock starts: as many on both sides."""


class Missing(Exception):
    """A peer's package is not there, or of another release."""


def serve() -> None:
    """Fork, wait, and answer until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            _say(exit=os.waitstatus_to_exitcode(status))
            continue
        if request["fork"]["peer"] is not None:
            with suppress(ImportError):  # the contender tries again, and says so
                importlib.import_module(PEERS[request["fork"]["peer"]].module)
        child = os.fork()
        if child == 0:
            _be_contender(request["socket"], request["fork"])
        _say(pid=child)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _be_contender(path: str, what: dict[str, Any]) -> None:
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1, 2):  # the pipes belong to the conversation above
            os.dup2(quiet, target)
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(path)
            with channel.makefile("rw") as talk:

                def answer(**said: Any) -> None:
                    talk.write(json.dumps(said, allow_nan=False) + "\n")
                    talk.flush()

                try:
                    _contend(talk, answer, **what)
                except Unsupported as error:
                    answer(status="unsupported", error=one_line(error))
                except Missing as error:
                    answer(status="missing", error=str(error))
                except Exception as error:  # theirs or ours: it is this contender's result
                    status, reason = ending(error)
                    answer(status=status, error=reason)
        code = 0
    finally:
        os._exit(code)  # never back into the loop


def _contend(
    talk: Any, answer: Any, *, cell: dict[str, Any], peer: str | None, role: str, memory_limit_bytes: int | None
) -> None:
    """Play one role, of one side.

    Args:
        cell: of ours; a peer mirrors it.
        role: "check" (does it compute what ours does?), "memory" (the peak of one call) or "time" (each line that
            comes asks for one call).
    """
    ours = SpeedCell(**cell)
    torch.set_num_threads(ours.threads)
    torch.manual_seed(0)
    if peer is not None:
        versions = installed(peer)
    if role == "check":
        assert peer is not None
        found = PEERS[peer].agreement()
        answer(status="ok", holds=found.holds, versions=versions, **found._asdict())
        return
    if memory_limit_bytes is not None:
        limit_memory(ours, memory_limit_bytes)
    if role == "memory":
        work = _work(ours, peer)
        work.before()
        peak = peak_memory(work.run, ours.device)
        answer(status="ok", peak_bytes=peak.peak_bytes, reserved_bytes=peak.reserved_bytes, peak_method=peak.method)
        return
    _time(talk, answer, ours, peer)


def _time(talk: Any, answer: Any, ours: SpeedCell, peer: str | None) -> None:
    dtype = getattr(torch, ours.dtype)
    # where a peer refuses so short a length, the first timed call is the first
    with suppress(Unsupported):
        short = _work(SpeedCell(**{**vars(ours), "length": min(ours.length, WARM_LENGTH)}), peer)
        for _ in range(2):
            short.before()
            short.run()
        del short
    layer = ours.build()
    work = _work(ours, peer, layer)
    linear = LinearFlops(layer)
    answer(status="ok")
    resident: int | None = None
    for line in talk:
        if json.loads(line) == "end":
            floor = analytic_flops(ours, layer, linear.flops, work.seen)[1] if peer is None else None
            answer(status="ok", resident_bytes=resident, floor_flops=floor)
            return
        # on both sides, so that both calls begin with the same things in the cache
        rate = matmul_rate(device=ours.device, dtype=dtype)
        work.before()
        meter = ResidentPeak() if resident is None else None
        with linear if meter else nullcontext():
            seconds, computed = clock(work.run, ours.device)
        if meter is not None:
            resident = meter.bytes()
        rate = (rate + matmul_rate(device=ours.device, dtype=dtype)) / 2  # of the minute: machines have moods
        answer(status="ok", seconds=seconds, cpu_seconds=computed, matmul_flops_per_second=rate)


def _work(ours: SpeedCell, peer: str | None, layer: Attention | None = None) -> Work:
    layer = ours.build() if layer is None else layer
    if peer is None:
        return prepare(layer, ours.shape(), variant=ours.variant, phase=ours.phase)
    return PEERS[peer](layer, ours.shape()).work(ours.variant, ours.phase)


def installed(peer: str) -> dict[str, str]:
    """The release of a peer's package in this environment.

    Raises:
        Missing: saying what to install.
    """
    adapter = PEERS[peer]
    if adapter.needs is None:
        return {"torch": torch.__version__}
    name = adapter.needs[: min(adapter.needs.find(sign) for sign in "<>=" if sign in adapter.needs)]
    try:
        version = metadata.version(name)
        importlib.import_module(adapter.module)
    except (metadata.PackageNotFoundError, ImportError):
        raise Missing(f"pip install '{adapter.needs}'{adapter.where}") from None
    if not version.startswith(adapter.release):
        raise Missing(f"pip install '{adapter.needs}'{adapter.where} (here is {version})")
    return {name: version}


if __name__ == "__main__":
    serve()
