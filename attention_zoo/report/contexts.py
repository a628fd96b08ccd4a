"""How much context groups of models make use of (`python -m experiments.context`), for the dashboard: context.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from attention_zoo.files import Damaged, read_json
from attention_zoo.report.rows import LeftOut, clean
from attention_zoo.report.sources import TABLE

CONTEXT = "context.json"
DIGITS = 5


class Reached(TypedDict):
    """The relative effective context of a model at one share of the positions, see `measure.relative_context`."""

    share: FiniteFloat
    tokens: int
    falls: bool
    gains: list[FiniteFloat]


class Read(TypedDict):
    """One model of the group."""

    name: str
    backend: str | None
    id: str | None
    bits_per_byte: list[FiniteFloat]
    reach: list[Reached]


class Group(TypedDict):
    """One file; the losses that it holds, too, are not drawn."""

    kind: Literal["context"]
    contexts: list[int]
    positions: int
    threshold: FiniteFloat
    runs: list[Read]


_CHECK = TypeAdapter(Group)


class Found(NamedTuple):
    """Files beneath some folders.

    Fields:
        groups: what they say, by the name of their folder.
        left_out: those that cannot be drawn.
    """

    groups: list[tuple[str, Group]]
    left_out: list[LeftOut]


def contexts(paths: Iterable[str | Path]) -> Found:
    """All groups that were measured beneath some folders."""
    found = Found([], [])
    files = {file.resolve(): None for path in paths for file in _beneath(Path(path))}
    for file in files:
        try:
            value = _CHECK.validate_python(clean(read_json(file)), strict=False)
            _check_shapes(value)
        except (Damaged, OSError, ValueError) as error:
            wrong = error.errors()[0] if isinstance(error, ValidationError) else None
            said = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" if wrong else str(error)
            found.left_out.append(LeftOut(str(file), said.removeprefix(str(file)).strip(" :")))
        else:
            found.groups.append((file.parent.name, value))
    return found


def _beneath(path: Path) -> Iterator[Path]:
    if path.name == TABLE:  # which stands for its folder
        path = path.parent
    for place, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if CONTEXT in names:
            yield Path(place) / CONTEXT


def _check_shapes(value: Group) -> None:
    places = len(value["contexts"])
    if places < 2 or sorted(set(value["contexts"])) != value["contexts"] or value["contexts"][0] < 1:
        raise ValueError("contexts must be two or more, in rising order")
    if not value["runs"]:
        raise ValueError("runs must be one or more")
    shares = [each["share"] for each in value["runs"][0]["reach"]]
    for run in value["runs"]:
        wrong = len(run["bits_per_byte"]) != places or any(len(each["gains"]) != places - 1 for each in run["reach"])
        if wrong or not shares or [each["share"] for each in run["reach"]] != shares:
            raise ValueError(f"{run['name']}: figures must be of {places} contexts and of the same shares for all")


def drawn(groups: Sequence[tuple[str, Group]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The values that the page's scripts read.

    Args:
        labels: names of lines by the keys of the dashboard's runs.
    """
    return [
        {
            "title": folder, "contexts": group["contexts"], "positions": group["positions"],
            "threshold": group["threshold"], "runs": [_run(run, group["runs"], labels) for run in group["runs"]],
        }
        for folder, group in groups
    ]  # fmt: skip


def label_of(run: Read, runs: Sequence[Read], labels: Mapping[str, str]) -> str:
    """What a model is called: as in the dashboard where it is there; by its folder where its backend is there twice."""
    alone = sum(each["backend"] == run["backend"] for each in runs) == 1
    return labels.get(run["id"] or "") or (run["backend"] if alone and run["backend"] else run["name"])


def _run(run: Read, runs: Sequence[Read], labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "key": run["id"] if run["id"] in labels else None,
        "label": label_of(run, runs, labels),
        "bits": [_short(value) for value in run["bits_per_byte"]],
        "reach": [{**each, "gains": [_short(gain) for gain in each["gains"]]} for each in run["reach"]],
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
