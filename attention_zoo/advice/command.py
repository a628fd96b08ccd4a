"""The command `advise`: which attention for a length, a memory, a kind of problem and a device, from rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from attention_zoo.advice.kinds import kinds_of
from attention_zoo.advice.lines import Source
from attention_zoo.advice.matrix import Matrix
from attention_zoo.advice.sentences import Advice, Question, Sentence, advice
from attention_zoo.advice.sources import committed, rows_of
from attention_zoo.files import plain, write_atomic
from attention_zoo.measure.budget import parse_bytes
from attention_zoo.options import Positive, Text, check_fields
from attention_zoo.report import units
from attention_zoo.rules import OneOf
from attention_zoo.schemas import store

WIDE = 160
"""Columns of a file or a pipe."""


@dataclass
class AdviseConfig:
    """conf/advise.yaml.

    Fields:
        length: tokens of a row.
        memory: that there is, such as 8GiB; null: no limit is asked for.
        problem: its kind: text | recall | recall_within | recall_beyond | copy | multi_hop | pair | streaming | short;
            task=recall is the same.
        distance: tokens between an answer and what it needs; null: the length.
        device: cpu | cuda, whose costs are told.
        phase: of the costs: forward_backward | forward | train_step | prefill | decode.
        variant: of the costs: layer | core | model.
        results: a path or a list of paths: JSONL files or folders; null: the rows that a clone holds.
        details: whether mechanisms of which rows give no verdict on what is asked are spoken of one by one, too.
        output: folder for matrix.md, matrix.json and matrix.csv; null: none is written.
    """

    length: Positive = 4096
    memory: Any = None
    problem: Text = "recall"
    distance: Annotated[int, Field(ge=1, description="a positive integer or null")] | None = None
    device: Annotated[str, OneOf("cpu", "cuda")] = "cpu"
    phase: Annotated[str, OneOf("forward_backward", "forward", "train_step", "prefill", "decode")] = "forward_backward"
    variant: Annotated[str, OneOf("layer", "core", "model")] = "layer"
    results: Any = None
    details: bool = False
    output: Text | None = None


def register() -> None:
    """Make the schema known to Hydra, which conf/advise.yaml names first."""
    store("advise_schema", AdviseConfig)


def question_of(config: AdviseConfig) -> Question:
    """What is asked.

    Raises:
        ValueError: naming the option, its rule and the value.
    """
    check_fields(AdviseConfig, config)
    memory = None if config.memory is None else _bytes(config.memory)
    distance = config.length if config.distance is None else config.distance
    if distance > config.length:
        raise ValueError(f"distance must be at most the length, {config.length}, got {distance}")
    return Question(config.length, memory, kinds_of(config.problem), distance, config.device)


def _bytes(given: Any) -> int:
    try:
        found = parse_bytes(str(given))
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"memory must be a size such as 8GiB or 512MiB, or null, got {given!r}")
    return found


def advise(config: AdviseConfig, console: Console | None = None) -> Advice:
    """Say it, and write the matrix where an output is given.

    Raises:
        ValueError: for a wrong option, or no rows.
        OSError: naming the file that could not be written.
    """
    console = console or (here if (here := Console()).is_terminal else Console(width=WIDE))
    asked = question_of(config)
    rows = rows_of(config.results)
    costs: dict[str, Any] = {"device": config.device, "phase": config.phase, "variant": config.variant}
    found = advice(Matrix.of(rows, asked.length, kinds=asked.kinds, **costs), asked)
    for line in told(found, details=config.details):
        if isinstance(line, str):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(line)
    if rows.left_out:
        console.print(f"left out: {len(rows.left_out)} rows or files, {rows.left_out[0]}", markup=False, soft_wrap=True)
    if config.output is not None:
        write(Matrix.of(rows, asked.length, **costs), config.output)
        console.print(f"wrote matrix.md, matrix.json and matrix.csv in {config.output}", markup=False, soft_wrap=True)
    return found


def told(found: Advice, *, details: bool = True) -> Iterator[str | Table]:
    """What it comes to, a table, and all sentences, which end in the numbers of the sources that carry them.

    Args:
        details: whether mechanisms are spoken of one by one of which rows give no verdict on what is asked.
    """
    numbers: dict[str, int] = {}

    def cite(sentence: Sentence) -> str:
        return "".join(f" [{numbers.setdefault(each, len(numbers) + 1)}]" for each in cited(sentence))

    yield f"Asked: {found.question.words()}."
    if found.setting is not None:
        machines = dict.fromkeys(
            Source.of(row).device for many in found.lines.values() for each in many if each.about == "costs"
            for row in each.rows
        )  # fmt: skip
        yield f"Costs are of one {found.setting.words()}{'; on ' if machines else ''}{units.listed(list(machines))}."
    if not found.lines:
        yield "Nothing is known: no row is of this device, or of this kind of problem."
    yield ""
    yield from (f"{each.text}{cite(each)}" for each in found.ends)
    telling = found.telling()
    if telling:
        yield ""
        yield table(found)
    for line in found.lines if details else telling:
        yield ""
        yield line.label
        yield from (f"  {each.about:7}{each.text}{cite(each)}" for each in found.lines[line])
    silent = [line.label for line in found.lines if line not in telling]
    if silent and not details:
        yield ""
        yield f"Of these rows give no verdict on what is asked (details=true says why): {units.listed(silent)}."
    if numbers:
        yield ""
        yield from (f"[{number}] {source}" for source, number in numbers.items())


def table(found: Advice) -> Table:
    """In brief: what rows tell of each mechanism of which they give a verdict."""
    asked = found.question
    fits = "needs" if asked.memory is None else f"fits {units.whole(units.size(asked.memory))}"
    titles = ["mechanism", fits, f"sees {asked.distance:,} back", *(kind.title for kind in asked.kinds), "takes"]
    shown = Table(*(Column(title, overflow="fold") for title in titles), box=SIMPLE)
    for line in found.telling():
        many = found.lines[line]
        learns = [each for each in many if each.about == "learns"]
        others = {each.about: each for each in many if each.about != "learns"}
        told = [others["fits"], others["sees"], *learns, others["costs"]]
        shown.add_row(line.label, *(each.brief or "not known" for each in told))
    return shown


def cited(sentence: Sentence) -> list[str]:
    """The sources of a sentence: file with ids of rows, the day and commit of its last change, code and device."""
    files: dict[tuple[str, str, str], list[str]] = {}
    for row in sentence.rows:
        source = Source.of(row)
        files.setdefault((source.file, source.code, source.device), []).append(source.id)
    return [_source(*where, list(dict.fromkeys(ids))) for where, ids in files.items()]


def _source(file: str, code: str, device: str, ids: Sequence[str]) -> str:
    when = committed(file) or "day not known"
    return f"{file}: {', '.join(ids)}; {when}; code {code}; {device}"


def write(matrix: Matrix, folder: str | Path) -> None:
    """The matrix as a page of Markdown, and every cell with its rows."""
    place = Path(folder)
    write_atomic(place / "matrix.md", matrix.markdown() + "\n")
    write_atomic(place / "matrix.json", json.dumps(plain(matrix.as_json()), indent=1, allow_nan=False) + "\n")
    write_atomic(place / "matrix.csv", matrix.as_csv())
