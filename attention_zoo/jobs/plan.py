"""What is to be done in a folder, written before it is begun: by this others tell what is missing, and how to go on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from attention_zoo.files import Damaged, plain, read_json, write_json
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.identity import source_digest
from attention_zoo.measure.progress import named

PLAN = "plan.json"
COMMAND: ContextVar[str] = ContextVar("command", default="")
"""As it was typed, of the work that goes on here; empty where nobody typed one."""
MANY = {"-m", "--multirun"}
"""Words of a command that stands for several jobs."""


@dataclass(frozen=True)
class Planned:
    """One cell.

    Fields:
        name: what tells it from the others.
        kind: "training", whose place is a folder; or "cell" of a benchmark or "match" with a peer, whose place is a
            row's file.
        place: relative to the folder of the plan.
        id: of the row that counts; None: whichever is there.
        steps: of a training.
        tokens: of a step.
        seconds: that it will take, as far as one could tell; None where not.
    """

    name: str
    kind: Literal["training", "cell", "match"]
    place: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    id: str | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None


@dataclass(frozen=True)
class Plan:
    """All cells, in the order in which they are done.

    Fields:
        command: that does them, as it is typed; empty where it is not known.
        where: the folder that it was typed in.
        parallel: cells at a time.
        code: digest of the source by which cells are named.
    """

    command: str
    where: str
    cells: list[Planned]
    parallel: Annotated[int, Field(ge=1)] = 1
    code: str = ""

    def again(self, *words: str) -> str:
        """The command that does what is missing, to be typed in any folder; empty where it is not known."""
        if not self.command:
            return ""
        said = " ".join([self.command, *(word for word in words if word not in self.command.split())])
        said = " ".join(word for word in said.split(" ") if word != "dry=true")
        return said if self.where == os.getcwd() else f"cd {shlex.quote(self.where)} && {said}"


def write_plan(folder: str | Path, command: str, cells: Sequence[Planned], *, parallel: int = 1) -> Path:
    """Write it into a folder. Jobs of one sweep may share it, one after another: the same command by the same code adds
    to what is planned there, and any other begins anew.

    Args:
        cells: whose places are paths of any kind; they are kept relative to the folder, which may be moved.

    Raises:
        OSError: naming the file.
    """
    folder = Path(folder).absolute()
    kept = [replace(each, place=os.path.relpath(each.place, folder)) for each in cells]
    plan = Plan(command, os.getcwd(), kept, parallel, source_digest())
    return write_json(folder / PLAN, plain(asdict(replace(plan, cells=[*_before(folder, plan), *kept]))))


def _before(folder: Path, plan: Plan) -> list[Planned]:
    """What an earlier job of the same sweep has planned beside."""
    try:
        old = read_plan(folder / PLAN)
    except (FileNotFoundError, Damaged):
        return []
    alike = replace(old, cells=[], parallel=plan.parallel) == replace(plan, cells=[])
    if not alike or not MANY & set(plan.command.split()):
        return []
    mine = {each.place for each in plan.cells}
    return [each for each in old.cells if each.place not in mine]


def planned_cells(cells: Iterable[SpeedCell], folder: Path) -> list[Planned]:
    """Cells to measure, shortest first, as `measure.cells.run_cells` does them."""
    found = []
    for cell in sorted(cells, key=lambda cell: cell.length):
        name = cell.identity()
        found.append(Planned(named(cell), "cell", str(folder.absolute() / "cells" / f"{name}.json"), id=name))
    return list(dict.fromkeys(found))


def read_plan(path: str | Path) -> Plan:
    """Read one.

    Raises:
        Damaged: for something else in its place, naming it.
        FileNotFoundError: if there is nothing.
    """
    found = read_json(path)
    try:
        return TypeAdapter(Plan).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Damaged(f"{path} is no plan: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
