"""A table of the README, made from committed rows."""

from __future__ import annotations

from pathlib import Path

from attention_zoo.report import read, units
from attention_zoo.report.rows import Row

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def reach_table() -> tuple[list[str], list[list[str]]]:
    """How far each mechanism gets on one thread: long calls, decoding, a budget."""
    long, decode, budget = (
        read([RESULTS / name / "results.jsonl"]) for name in ("long_cpu", "decode_cpu", "budget_cpu")
    )
    headers = [
        "mechanism", "core at 1,048,576 tokens", "layer at 524,288 tokens", "tokens a second at 1,024",
        "tokens a second at 131,072", "state at 131,072", "longest core within 1 GiB",
    ]  # fmt: skip
    cells = []
    for name in ("longformer", "bigbird", "reformer", "transformer_xl"):
        line = [name]
        for variant in ("core", "layer"):
            (row,) = (row for row in long if (row["backend"], row["variant"]) == (name, variant))
            line.append(f"{units.seconds(row['seconds'])}, {units.size(row['held_bytes'] + row['resident_bytes'])}")
        steps = {row["length"]: row for row in decode if row["backend"] == name}
        line += [units.count(steps[length]["tokens_per_second"]) for length in (1024, 131072)]
        line.append(units.size(steps[131072]["state_bytes"]))
        (most,) = (row for row in budget if row["kind"] == "budget" and row["backend"] == name)
        line.append(_most(most))
        cells.append(line)
    return headers, cells


def _most(row: Row) -> str:
    return units.count(row["length"]) + ("" if row["verified"] else " (not verified)")
