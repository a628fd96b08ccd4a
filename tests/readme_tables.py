"""Tables of the README, made from committed rows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from attention_zoo.advice.lines import line_of
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


def steps_table() -> tuple[list[str], list[list[str]]]:
    """Steps of decoding: how many times Mistral's each mechanism's take, over states, by width and rows."""
    lines = (RESULTS / "steps_cpu" / "steps.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "ratio" in row]
    batches = sorted({row["batch"] for row in rows})
    cells = []
    for name in dict.fromkeys(row["mechanism"] for row in rows):
        for dim in (512, 1024):
            line = [name, units.count(dim)]
            for batch in batches:
                setting = (name, dim, batch)
                found = [row["ratio"] for row in rows if (row["mechanism"], row["dim"], row["batch"]) == setting]
                line.append(f"{min(found):.2f}–{max(found):.2f}")
            cells.append(line)
    return ["mechanism", "width", *(f"{batch} {'row' if batch == 1 else 'rows'}" for batch in batches)], cells


def distance_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Recall of each backend by how far behind the question the pair stands: means over seeds, with their range."""
    trained = [row for row in rows if row["kind"] == "quality" and row["status"] == "ok"]
    edges = [edge for edge, *_ in trained[0]["by_group"]["distance"]]
    spans = [f"{a + 1} to {b}" if b > a + 1 else str(b) for a, b in zip([0, *edges], edges)]
    cells = []
    for name in dict.fromkeys(row["backend"] for row in trained):
        mine = [row for row in trained if row["backend"] == name]
        assert all([edge for edge, *_ in row["by_group"]["distance"]] == edges for row in mine), name
        first = mine[0]
        model, keys = first["config"]["model"], first["given"]["keys_mean"]
        at = [f"{key}={value}" for key, value in line_of(first).options]
        if model.get("shorten"):
            at += [f"shorten={model['shorten']}", f"{model['depth']} layers"]
        line = [name, ", ".join(at) or "defaults", units.count(first["parameters"]), str(len(mine))]
        line.append("–" if keys is None else f"{keys:.0f}")
        for place in range(len(edges)):
            line.append(_shares([row["by_group"]["distance"][place][1] for row in mine]))
        cells.append([*line, _shares([row["metrics"]["accuracy"] for row in mine])])
    return ["mechanism", "options", "parameters", "seeds", "keys a query sees, mean", *spans, "all"], cells


def _shares(found: list[float]) -> str:
    return f"{100 * statistics.fmean(found):.0f} % ({100 * min(found):.0f}–{100 * max(found):.0f})"
