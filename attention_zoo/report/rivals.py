"""Tables of what was compared with other implementations, of the figures to reach, and of lengths within a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attention_zoo.measure.peers.figures import verdicts
from attention_zoo.report import rows as results
from attention_zoo.report import units
from attention_zoo.report.cells import Table
from attention_zoo.report.rows import FROM
from attention_zoo.report.units import NONE
from attention_zoo.results.row import Row

FAIR = (
    "Both sides in one run, in turns, each in a process of its own; ratios are theirs over ours, so that above 1 ours "
    "is faster or smaller: the median of adjacent calls, and the range. Before, each peer had to show that it computes "
    "the same as ours, outputs and gradients. “CPU” is the ratio of processor time, told where other work had the "
    "cores."
)
GOALS = (
    "Each figure holds for its own setting alone: core, forward + backward, 8 heads × 64, batch 1; a train step is "
    "that of a whole model; on a CPU one thread."
)
BUDGET = (
    "Parameters, inputs and the peak of one call together. Verified: a process limited to the budget got through at "
    "the first length and ran out of memory at the second."
)


def peers_table(rows: Iterable[Row]) -> Table:
    """One line for each of ours and each peer that it met."""
    headers = [
        "ours", "tokens", "setting", "against", "time ratio", "range", "memory ratio", "resident ratio", "× floor",
        "ours takes", "theirs takes", "ours peaks", "theirs peaks",
    ]  # fmt: skip
    cells = []
    for row in sorted(results.of(rows, "peer"), key=_order):
        ok = results.ok(row)
        low, high = (row.get(key) for key in ("time_ratio_min", "time_ratio_max"))
        spread = NONE if low is None or high is None else f"{units.significant(low)}–{units.significant(high)}"
        cells.append(
            [
                named(row), f"{row['length']:,}", setting(row), row["title"],
                _times(row.get("time_ratio")) + _busy(row), spread if ok else NONE,
                _times(row.get("memory_ratio")), _times(row.get("resident_ratio")), units.fixed(row.get("floor_ratio")),
                units.seconds(row.get("seconds")), units.seconds(row.get("their_seconds")) if ok else results.why(row),
                units.size(row.get("peak_bytes")), units.size(row.get("their_peak_bytes")),
            ]
        )  # fmt: skip
    return Table(headers, cells)


def short_table(rows: Iterable[Row]) -> Table:
    """The same for a page of prose, where one sentence tells the setting."""
    cells = [
        [
            f"{named(row)}, {'causal' if row['causal'] else 'two-sided'}", f"{row['length']:,}", row["title"],
            _times(row.get("time_ratio")), _times(row.get("memory_ratio")),
            units.seconds(row.get("seconds")), units.size(row.get("peak_bytes")),
        ]
        for row in sorted(results.of(rows, "peer"), key=_order)
        if results.ok(row)
    ]  # fmt: skip
    headers = ["", "tokens", "against", "times faster", "times less memory", "ours takes", "ours peaks"]
    return Table(headers, cells)


def _order(row: Row) -> tuple[Any, ...]:
    return row["device"], row["variant"], row["backend"], row["causal"], row["length"], row["against"]


def _busy(row: Row) -> str:
    """Where the clock and the processor tell different things, other work had the cores."""
    wall, cpu = row.get("time_ratio"), row.get("cpu_time_ratio")
    apart = row["device"] == "cpu" and wall and cpu and not 0.8 < wall / cpu < 1.25
    return f" (CPU {_times(cpu)})" if apart else ""


def fairness(rows: Iterable[Row]) -> list[str]:
    """For each peer what makes the comparison fair, and how closely it computes the same."""
    said: dict[str, str] = {}
    for row in results.of(rows, "peer"):
        found = row.get("agreement")
        if found:
            versions = ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items())
            worst = max(found["output"], found["gradient"])
            fair = row.get("fair") or ""
            said[row["against"]] = f"{row['title']} ({versions}): {fair} {worst:.0e} apart on {found['on']}."
    return list(said.values())


def figures_table(rows: Iterable[Row]) -> Table:
    """The figures to reach: goal, measured, verdict."""
    rows = list(rows)
    cells = []
    files = list(dict.fromkeys(row.get(FROM) for row in rows))
    every = [verdicts(map(_told, (row for row in rows if row.get(FROM) == file))) for file in files] or [verdicts([])]
    for alike in zip(*every):
        known = [(file, verdict) for file, verdict in zip(files, alike) if verdict.value is not None]
        for file, verdict in known or [(None, alike[0])]:
            figure, value = verdict.figure, verdict.value
            rate = figure.said.endswith("%")
            measured = NONE if value is None else f"{value:.0%}" if rate else units.significant(value)
            name = f"{figure.backend} [{file}]" if file else figure.backend
            cells.append([name, figure.against, figure.said, measured, verdict.state])
    return Table(["", "against", "goal", "measured", ""], cells)


def _told(row: Row) -> Row:
    """A row that tells its options, if only that there are none."""
    return {**row, "config": {**(row.get("config") or {}), "options": results.options(row)}}


def budgets_table(rows: Iterable[Row]) -> Table:
    """The longest trainable lengths."""
    headers = ["", "setting", "longest length", "budget", "a token", "fits", "does not fit", "verified"]
    cells = []
    for row in sorted(results.of(rows, "budget"), key=lambda row: (row["budget_bytes"], named(row))):
        tried = [f"{row[key]['length']:,}" if row.get(key) else NONE for key in ("fits", "fails")]
        length = units.count(row.get("length")) if results.ok(row) else results.why(row)
        verified = "yes" if row.get("verified") else row.get("not_verified") or "no"
        cells.append(
            [named(row), setting(row), length, units.size(row["budget_bytes"]), units.size(row.get("bytes_per_token")),
             *tried, verified]
        )  # fmt: skip
    return Table(headers, cells)


def named(row: Row) -> str:
    """A mechanism with its options, in words; and the file, where rows come from several."""
    options = {key: value for key, value in results.options(row).items() if key != "kernel"}
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    kernel = "" if row.get("kernel") in (None, "auto") else f"/{row['kernel']}"
    file = f" [{row[FROM]}]" if row.get(FROM) else ""
    return f"{row['backend']}{kernel}" + (f" ({said})" if said else "") + file


def setting(row: Row) -> str:
    """All but the length, in words."""
    parts = ["causal" if row["causal"] else "two-sided", row["variant"], row["phase"].replace("_", " + ")]
    parts += [f"{row['heads']} × {row['head_width']}"] + ([f"batch {row['batch']}"] if row["batch"] != 1 else [])
    parts += [row["dtype"], row["device"]]
    return ", ".join([*parts, f"threads {row['threads']}"] if row["device"] == "cpu" else parts)


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{units.significant(ratio)}×"
