"""Ours and theirs in turns: in one run, each in a process of its own, so that drift of the machine meets both alike.

A heat holds the matches of one length and direction. First each side's memory is observed, alone in a fresh process.
Then all sides are started and woken by a short call; in each round every peer is timed right beside those of ours that
it meets, before them and after them by turns, and each such pair gives one ratio. What is told is the median of ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.identity import identity
from attention_zoo.measure.peers.contender import Contender, Lost, Stable
from attention_zoo.measure.peers.matches import Match, heats
from attention_zoo.measure.peers.table import PEERS
from attention_zoo.results.row import Ours, PeerRow, Theirs

Say = Callable[[str], None]
Key = tuple[str | None, Any]


@dataclass
class Side:
    """One contender of a heat, and what became of it."""

    cell: SpeedCell
    peer: str | None
    contender: Contender | None = None
    lost: Lost | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # FLOPs a second of a matrix product, around each call of ours
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return PEERS[self.peer].title if self.peer else self.cell.backend

    @property
    def key(self) -> Key:
        """Peers that mirror nothing of a backend are the same for all."""
        if self.peer is not None and PEERS[self.peer].backend is None:
            return self.peer, None
        return self.peer, self.cell.series()


def run_contest(
    many: Sequence[Match],
    *,
    rounds: int = 3,
    timeout_s: float = 120.0,
    memory_limit_bytes: int | None = None,
    pythons: dict[str, str] | None = None,
    say: Say = lambda line: None,
    on_rows: Callable[[Sequence[PeerRow]], None] = lambda rows: None,
) -> list[PeerRow]:
    """Run every match.

    Args:
        many: see `matches.matches`.
        rounds: ratios of each pair.
        timeout_s: of one call of one side.
        memory_limit_bytes: of one side, see `cells.run_cells`.
        pythons: peer -> the Python whose environment holds it; default this one.
        say: is told each step in a line.
        on_rows: is handed the rows of each heat as soon as it is over.

    Returns:
        One row of kind "peer" for each of ours and each peer that it met.
    """
    rows: list[PeerRow] = []
    agreements: dict[str, dict[str, Any] | Lost] = {}
    with Stable(pythons, memory_limit_bytes) as stable:
        for heat in heats(many):
            found = _Heat(heat, stable, rounds, timeout_s, agreements, say).run()
            on_rows(found)
            rows += found
    return rows


def config_of(cell: SpeedCell, peer: str, rounds: int) -> dict[str, Any]:
    """What one of ours and one peer are measured at."""
    return {**asdict(cell), "against": peer, "rounds": rounds}


def row_id(cell: SpeedCell, peer: str, rounds: int) -> str:
    """Of the row that they give."""
    return identity(config_of(cell, peer, rounds), device=device_name(cell.device), threads=cell.threads)


class _Heat:
    def __init__(
        self, heat: list[Match], stable: Stable, rounds: int, timeout_s: float, agreements: dict[str, Any], say: Say
    ):
        self.stable, self.rounds, self.timeout_s, self.agreements, self.say = stable, rounds, timeout_s, agreements, say
        first = heat[0].cell
        self.title = f"{first.length:,} tokens, {'causal' if first.causal else 'two-sided'}"
        self.sides: dict[Key, Side] = {}
        self.pairs = [
            (self._side(match.cell, None), self._side(match.cell, peer)) for match in heat for peer in match.rivals
        ]
        self.ratios: dict[tuple[Key, Key], list[tuple[float, float]]] = {(a.key, b.key): [] for a, b in self.pairs}

    def _side(self, cell: SpeedCell, peer: str | None) -> Side:
        side = Side(cell, peer)
        return self.sides.setdefault(side.key, side)

    def run(self) -> list[PeerRow]:
        for side in self.sides.values():
            self._try(side, self._check)
            self._try(side, self._observe)
        with ExitStack() as stack:
            for side in self.sides.values():
                self._try(side, lambda side: self._start(side, stack))
            for number in range(self.rounds):
                self._round(number)
            for side in self.sides.values():
                self._try(side, self._finish)
        return [self._row(ours, theirs) for ours, theirs in self.pairs]

    def _try(self, side: Side, step: Callable[[Side], None]) -> None:
        """What happens to one side is its own result."""
        if side.lost is None:
            try:
                step(side)
            except Lost as lost:
                side.lost = lost
                self.say(f"{self.title}: {side.name}: {lost.status}: {lost.reason}")

    def _check(self, side: Side) -> None:
        """Does it compute what ours does? Asked once in a run."""
        if side.peer is None:
            return
        if side.peer not in self.agreements:
            try:
                with self.stable.start(side.cell, side.peer, "check", timeout_s=self.timeout_s) as contender:
                    self.agreements[side.peer] = contender.ask()
            except Lost as lost:
                self.agreements[side.peer] = lost
        found = self.agreements[side.peer]
        if isinstance(found, Lost):
            raise found
        if not found["holds"]:
            worst = max(found["output"], found["gradient"])
            raise Lost("failed", f"does not compute what ours does: {worst:.1e} apart on {found['on']}")
        side.figures["agreement"] = {key: found[key] for key in ("output", "gradient", "bound", "on")}
        side.figures["versions"] = found["versions"]

    def _observe(self, side: Side) -> None:
        with self.stable.start(side.cell, side.peer, "memory", timeout_s=self.timeout_s) as contender:
            side.figures.update(contender.ask())

    def _start(self, side: Side, stack: ExitStack) -> None:
        contender = self.stable.start(side.cell, side.peer, "time", timeout_s=self.timeout_s)
        side.contender = stack.enter_context(contender)
        contender.ask()

    def _round(self, number: int) -> None:
        peers = dict.fromkeys(theirs.key for _, theirs in self.pairs)
        for key in peers if number % 2 == 0 else reversed(peers):
            theirs = self.sides[key]
            met = [ours for ours, other in self.pairs if other.key == key and ours.lost is None]
            if not met or theirs.lost is not None:
                continue
            order = [*met, theirs] if number % 2 == 0 else [theirs, *met]
            took: dict[Key, tuple[float, float]] = {}
            for side in order:
                self._try(side, lambda side: took.update({side.key: self._call(side)}))  # noqa: B023  (called at once)
            if theirs.key not in took:
                continue
            for ours in met:
                if ours.key in took:
                    mine, other = took[ours.key], took[theirs.key]
                    self.ratios[ours.key, theirs.key].append((other[0] / mine[0], other[1] / max(mine[1], 1e-9)))
            parts = [f"{side.name} {took[side.key][0]:.3g} s" for side in order if side.key in took]
            self.say(f"{self.title}, round {number + 1} of {self.rounds}: {', '.join(parts)}")

    def _call(self, side: Side) -> tuple[float, float]:
        assert side.contender is not None
        took = side.contender.ask("call")
        side.seconds.append(took["seconds"])
        side.cpu_seconds.append(took["cpu_seconds"])
        if side.peer is None:
            side.rates.append(took["matmul_flops_per_second"])
        return took["seconds"], took["cpu_seconds"]

    def _finish(self, side: Side) -> None:
        assert side.contender is not None
        side.figures.update(side.contender.ask("end"))

    def _row(self, ours: Side, theirs: Side) -> PeerRow:
        assert theirs.peer is not None
        cell, adapter = ours.cell, PEERS[theirs.peer]
        lost = ours.lost or theirs.lost
        ratios = self.ratios[ours.key, theirs.key]
        config = config_of(cell, theirs.peer, self.rounds)
        mine, other = _figures(ours), _figures(theirs)
        return {
            "kind": "peer",
            "id": row_id(cell, theirs.peer, self.rounds),
            "backend": cell.backend,
            "against": theirs.peer,
            "title": adapter.title,
            "fair": adapter.fair,
            "status": lost.status if lost else "ok",
            "error": lost.reason if lost else None,
            "length": cell.length,
            **cell.call(),
            "rounds": len(ratios),
            "time_ratio": statistics.median(wall for wall, _ in ratios) if ratios else None,
            "time_ratio_min": min((wall for wall, _ in ratios), default=None),
            "time_ratio_max": max((wall for wall, _ in ratios), default=None),
            "cpu_time_ratio": statistics.median(cpu for _, cpu in ratios) if ratios else None,
            "memory_ratio": _over(other["peak_bytes"], mine["peak_bytes"]),
            "resident_ratio": _over(other["resident_bytes"], mine["resident_bytes"]),
            **mine,
            **_theirs(other),
            "floor_flops": ours.figures.get("floor_flops"),
            "floor_ratio": _floor_ratio(ours),
            "matmul_flops_per_second": statistics.median(ours.rates) if ours.rates else None,
            "agreement": theirs.figures.get("agreement"),
            "versions": theirs.figures.get("versions"),
            "config": config,
            "environment": environment(cell.threads),
        }


def _figures(side: Side) -> Ours:
    seconds = side.seconds
    return {
        "seconds": statistics.median(seconds) if seconds else None,
        "seconds_min": min(seconds, default=None),
        "seconds_max": max(seconds, default=None),
        "cpu_seconds": statistics.median(side.cpu_seconds) if seconds else None,
        "peak_bytes": side.figures.get("peak_bytes"),
        "resident_bytes": side.figures.get("resident_bytes"),
        "peak_method": side.figures.get("peak_method"),
    }


def _theirs(figures: Ours) -> Theirs:
    return cast(Theirs, {f"their_{key}": value for key, value in figures.items()})


def _over(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


def _floor_ratio(side: Side) -> float | None:
    """Median over the calls, each against the rate that was measured around it."""
    floor = side.figures.get("floor_flops")
    if not floor or not side.seconds:
        return None
    return statistics.median(seconds * rate / floor for seconds, rate in zip(side.seconds, side.rates))
