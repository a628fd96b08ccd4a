"""The process that forks contenders: `python -m attention_zoo.measure.peers.server`, in the environment of a peer.

It imports and does nothing else, so that a contender starts fresh and yet at once. Spoken in lines of JSON over a
socket: {"fork": what `_contend` takes}, with two descriptors, a contender's own socket and its log, is answered by
{"pid"}, {"wait": pid} by {"exit": code or minus the signal}. A contender says what it has to say over its socket.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
from contextlib import nullcontext, suppress
from functools import partial
from importlib import metadata
from typing import Any

import torch

from attention_zoo.contract import Attention, Unsupported
from attention_zoo.measure.cell import SpeedCell, analytic_flops, work_for
from attention_zoo.measure.ends import ending, one_line
from attention_zoo.measure.flops import LinearFlops
from attention_zoo.measure.forked import LONGEST_S, end_of, fork, link_to_parent
from attention_zoo.measure.limit import limited
from attention_zoo.measure.link import Link
from attention_zoo.measure.memory import ResidentPeak, peak_memory
from attention_zoo.measure.peers.table import PEERS
from attention_zoo.measure.speed import clock, matmul_rate
from attention_zoo.measure.work import Work
from attention_zoo.measure.worker import FIRST
from attention_zoo.model.transformer import Transformer

WARM_LENGTH = 1024
"""Tokens of the call that wakes libraries and threads before the clock starts: as many on both sides."""
LEAVE_S = 10.0
"""A contender that nobody asks any more is given so long to end."""


class Missing(Exception):
    """A peer's package is not there, or of another release."""


def serve(link: Link) -> None:
    """Fork, wait, and answer until nobody can ask any more."""
    for name in FIRST:
        importlib.import_module(name)
    link.say({"ready": True})
    while (asked := link.hear()) is not None:
        if "wait" in asked:
            link.say({"exit": end_of(asked["wait"], LEAVE_S)})
            continue
        channel, log = link.take_files()
        if asked["fork"]["peer"] is not None:
            with suppress(Exception, SystemExit):  # the contender tries again, and says so
                importlib.import_module(PEERS[asked["fork"]["peer"]].module)
        child = fork(partial(_be_contender, channel, asked["fork"]), log=log, close=[link.fileno()])
        os.close(channel)
        os.close(log)
        link.say({"pid": child})


class _Talk:
    """What a contender hears and says. From what it hears to what it says it has `timeout_s`, also if nobody waits."""

    def __init__(self, channel: int, timeout_s: float | None):
        self._link, self._timeout_s = Link(socket.socket(fileno=channel)), timeout_s
        self._clock()

    def hear(self) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = self._link.hear()
        self._clock()
        return said

    def answer(self, **said: Any) -> None:
        self._link.say(said)

    def _clock(self) -> None:
        if self._timeout_s is not None:
            signal.setitimer(signal.ITIMER_REAL, min(self._timeout_s, LONGEST_S))


def _be_contender(channel: int, what: dict[str, Any]) -> None:
    talk = _Talk(channel, what.pop("timeout_s"))
    try:
        _contend(talk, **what)
    except Unsupported as error:
        talk.answer(status="unsupported", error=one_line(error))
    except Missing as error:
        talk.answer(status="missing", error=str(error))
    except Exception as error:  # theirs or ours: it is this contender's result
        status, reason = ending(error)
        talk.answer(status=status, error=reason)


def _contend(talk: _Talk, *, cell: dict[str, Any], peer: str | None, role: str, memory_limit_bytes: int | None) -> None:
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
        talk.answer(status="ok", holds=found.holds, versions=versions, **found._asdict())
        return
    with limited(memory_limit_bytes, device=ours.device, threads=ours.threads):
        if role == "time":
            _time(talk, ours, peer)
            return
        work = _work(ours, peer)
        work.before()
        peak = peak_memory(work.run, ours.device)
    figures = {"peak_bytes": peak.peak_bytes, "reserved_bytes": peak.reserved_bytes, "peak_method": peak.method}
    talk.answer(status="ok", **figures)


def _time(talk: _Talk, ours: SpeedCell, peer: str | None) -> None:
    dtype = getattr(torch, ours.dtype)
    # where a peer refuses so short a length, the first timed call is the first
    with suppress(Unsupported):
        short = _work(SpeedCell(**{**vars(ours), "length": min(ours.length, WARM_LENGTH)}), peer)
        for _ in range(2):
            short.before()
            short.run()
        del short
    layer = ours.measured()
    work = _work(ours, peer, layer)
    linear = LinearFlops(layer)
    talk.answer(status="ok")
    resident: int | None = None
    while (said := talk.hear()) is not None:
        if said == "end":
            floor = analytic_flops(ours, layer, linear.flops, work.seen)[1] if peer is None else None
            talk.answer(status="ok", resident_bytes=resident, floor_flops=floor)
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
        talk.answer(status="ok", seconds=seconds, cpu_seconds=computed, matmul_flops_per_second=rate)


def _work(ours: SpeedCell, peer: str | None, layer: Attention | Transformer | None = None) -> Work:
    layer = ours.measured() if layer is None else layer
    if peer is None:
        return work_for(layer, ours)
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
    serve(link_to_parent())
