"""Rows and files that are not what a report expects: every key of every kind of row replaced by every wrong value or
dropped, hostile text, torn and foreign files. Whatever is bad must be named, and everything else drawn.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report_rows import made_up, portrait, quality, speed, unfinished
from rich.console import Console

from attention_zoo.report import Findings, frame, headline, read, rich_table, write_csv
from attention_zoo.report.build import sections
from attention_zoo.report.data import dashboard
from attention_zoo.report.extract import csv_text, latex, tables
from attention_zoo.report.rows import Rows, sift
from attention_zoo.report.summary import remarks

from . import Counts

TITLE = "malformed rows, hostile names and foreign files in a report"
SMALL, LARGE = 100, 4_000
TOGETHER = 24
"""Rows in one report."""

DROPPED = object()
WRONG: tuple[Any, ...] = (
    DROPPED, None, True, 0, -1, -4.5, 3, 10**9, 10**30, 10**5000, 1e300, 1e-300, float("nan"), float("inf"), "", "x",
    "12", "nan", "=1+1", "[red]", "[/]", "<script>alert(1)</script>", "\x00\x1b[31m", "\udc80", "a" * 100_000, [], [1],
    [[1, 2]], [[1]], ["x"], {}, {"x": 1}, {"length": "x"}, {"": {"": []}},
)  # fmt: skip
FILES: tuple[bytes, ...] = (
    b"", b"\n\n", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe\x00", b'{"kind": NaN}', b"{}\n" * 3, b"[" * 100_000,
    b'{"kind": "speed"}', b"9" * 5000, b'{"a": ' * 3000 + b"1" + b"}" * 3000,
)  # fmt: skip


def peer() -> dict[str, Any]:
    """A row of ours against another's."""
    row = speed("longformer", "auto", 4096)
    return row | {
        "kind": "peer", "id": "peer", "against": "sdpa", "title": "SDPA", "fair": "Same mask.", "time_ratio": 7.0,
        "time_ratio_min": 6.0, "time_ratio_max": 8.0, "cpu_time_ratio": 7.0, "memory_ratio": 1.5, "rounds": 3,
        "resident_ratio": 1.4, "their_seconds": 1.0, "their_peak_bytes": 10**8, "floor_flops": 10**9,
        "agreement": {"output": 1e-9, "gradient": 1e-9, "on": "33 tokens"}, "versions": {"torch": "2.13"},
    }  # fmt: skip


def budget() -> dict[str, Any]:
    """A row of a length within a memory."""
    row = speed("longformer", "auto", 4096)
    return row | {
        "kind": "budget", "id": "budget", "budget_bytes": 2**30, "verified": True, "not_verified": None,
        "fits": {"length": 4096}, "fails": {"length": 8192}, "bytes_per_token": 1000.0, "points": [[4096, 1.0]],
    }  # fmt: skip


def victims() -> list[dict[str, Any]]:
    """One row of each kind that is to be spoilt."""
    return [
        speed("bigbird", "auto", 1024), unfinished(speed("bigbird", "auto", 4096), "oom", "killed"), peer(), budget(),
        quality("bigbird", "text"), unfinished(quality("bigbird", "mqar"), "failed", "NotFinite"), portrait("bigbird"),
    ]  # fmt: skip


COMPANIONS = tuple(
    row for row in made_up()
    if row["backend"] in ("full", "reformer") and row.get("length") in (None, 1024, 4096) and row.get("task") != "mqar"
)  # fmt: skip


def places(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a row, nested ones too."""
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict):
            yield from places(item, (*path, key))


def run(count: int, seed: int) -> Counts:
    """Spoil `count` rows and files."""
    found = Counts()
    every = [(number, path) for number, row in enumerate(victims()) for path in places(row)]
    batch: dict[str, dict[str, Any]] = {}
    for number in range(count):
        drawn = random.Random(f"reports {seed}:{number}")
        found.tries += 1
        if drawn.random() < 0.1:
            for way, problem in _file(drawn):
                found.failed(way, f"reports {seed}:{number}: {problem}")
        else:
            case, row = spoilt(drawn, every, number)
            batch[f"reports {seed}:{number}: {case}"] = row
        if len(batch) == TOGETHER or number == count - 1:
            for way, problem in _rows(batch):
                found.failed(way, problem)
            batch = {}
    return found


def spoilt(drawn: random.Random, every: list[tuple[int, tuple[str, ...]]], number: int) -> tuple[str, dict[str, Any]]:
    """A row with one wrong value, and what was done to it."""
    victim, path = drawn.choice(every)
    value = drawn.choice(WRONG)
    row = copy.deepcopy(victims()[victim])
    row |= {"id": f"{row['id']}-{number}", "backend": f"bigbird{number}"}
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    if value is DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    words = "dropped" if value is DROPPED else f"is a {type(value).__name__}" if _long(value) else f"= {value!r}"
    return f"{victims()[victim]['kind']} row, {'.'.join(path)} {words}", row


def _rows(batch: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Draw spoilt rows beside good ones; where that goes wrong, each by itself, to tell which it was."""
    rows = [*copy.deepcopy(COMPANIONS), *copy.deepcopy(list(batch.values()))]
    problems: list[tuple[str, str]] = []
    try:
        sifted = sift(rows)
        if len(sifted) + len(sifted.left_out) != len(rows):
            problems.append(("lost", "a row is neither drawn nor named"))
        problems += judge(shown(sifted), sifted)
    except Exception as error:  # whatever it is, it ended the report
        problems.append(("raw", f"{type(error).__name__}: {str(error)[:200]}"))
    if problems and len(batch) > 1:
        for case, row in batch.items():
            yield from _rows({case: row})
    else:
        yield from ((way, f"{case}: {problem}") for way, problem in problems for case in batch)


def _file(drawn: random.Random) -> Iterator[tuple[str, str]]:
    content, name = drawn.choice(FILES), drawn.choice(("results.jsonl", "result.json", "cells/x.json", "folder"))
    case = f"{name} holds {content[:30]!r}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = folder / "run" / ("result.json" if name == "folder" else name)
        file.parent.mkdir(parents=True)
        if name == "folder":
            file.mkdir()  # in place of a file
        else:
            file.write_bytes(content)
        good = folder / "good.jsonl"
        write_rows(good, list(COMPANIONS[:6]))
        try:
            rows = read([good, folder / "run"] if name != "folder" else [good])
            yield from ((way, f"{case}: {problem}") for way, problem in judge(shown(rows), rows))
            named = name == "folder" or not content.strip() or any(str(file) in each.where for each in rows.left_out)
            if not named and not _torn(content):
                yield "lost", f"{case}: not named"
        except ValueError as error:
            if name != "folder" or "\n" in str(error):
                yield "raw", f"{case}: {str(error)[:200]}"
        except Exception as error:
            yield "raw", f"{case}: {type(error).__name__}: {str(error)[:200]}"


def _torn(content: bytes) -> bool:
    """Whether a table holds one line without an end: what a killed writer leaves, which is no fault."""
    return b"\n" not in content


def _long(value: Any) -> bool:
    return (isinstance(value, int) and abs(value) > 10**40) or (isinstance(value, str) and len(value) > 60)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(rows: Rows) -> str:
    """Everything that a report shows, in one text: page, terminal, tables, and what its scripts draw."""
    found = Findings.of(rows)
    body = frame.body("A report", sections(found)).replace("\n", " ")
    data = json.dumps(dashboard(found), allow_nan=False)
    files = "".join(csv_text(table) + latex(table) for table in tables(found).values())
    terminal = Console(width=100, file=io.StringIO(), record=True)
    terminal.print(rich_table(found))
    for line in [*headline(found), *remarks(found)]:
        terminal.print(line, markup=False, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as place:
        cells = write_csv(rows, Path(place) / "results.csv").read_text()
    return "\n".join((body, terminal.export_text(), cells, files, data)).encode().decode()


def judge(page: str, rows: Rows) -> Iterator[tuple[str, str]]:
    """What is wrong with what is shown."""
    for each in rows.left_out:
        if "Rows left out" not in page or each.where not in page:
            yield "lost", f"{each} is not named"
    for name in ("full (materialised", "full (fused", "reformer"):
        if name not in page:
            yield "lost", f"{name} is not drawn"
    if "<script>alert" in page.partition("\n")[0]:
        yield "wrong", "text of a row is a tag of the page"
    if found := re.search(r"[^\n]{0,40}\b(?:nan|inf|None|NaN|Infinity) (?:s|ms|MiB|tokens)\b", page):
        yield "wrong", f"a figure that is none: {found.group()}"
