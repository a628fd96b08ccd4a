"""What inspected models attend to (`python -m experiments.inspect`), for the dashboard: files attention.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from attention_zoo.files import Damaged, read_json
from attention_zoo.report.rows import LeftOut, clean
from attention_zoo.report.sources import TABLE

ATTENTION = "attention.json"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Shades of a block, from none to the largest of its head."""
DIGITS = 5
FIGURES = ("distance", "entropy", "outside", "sinks", "mass", "share")

Blocks = Annotated[list[Annotated[list[FiniteFloat], Field(min_length=1)]], Field(min_length=1)]
"""Weights of a head: a row for each block of queries."""


class Layer(TypedDict):
    """What `inspect.figures` says of one attention of a layer, lists over its heads. Files of before lack some."""

    layer: str
    number: NotRequired[int]
    keys: NotRequired[str]
    share: NotRequired[list[FiniteFloat] | None]
    blocks: list[Blocks]
    distance: list[FiniteFloat] | None
    entropy: list[FiniteFloat] | None
    outside: list[FiniteFloat] | None
    sinks: list[FiniteFloat] | None
    mass: list[FiniteFloat]


class Seen(TypedDict):
    """One run that read the text."""

    name: str
    backend: str | None
    id: str | None
    layers: list[Layer]


class Inspection(TypedDict):
    """One file."""

    kind: Literal["attention"]
    text: str
    window: int
    sinks: int
    tokens: int
    runs: list[Seen]


_CHECK = TypeAdapter(Inspection)


class Found(NamedTuple):
    """Files beneath some folders.

    Fields:
        inspections: what they say, by the name of their folder.
        left_out: those that cannot be drawn.
    """

    inspections: list[tuple[str, Inspection]]
    left_out: list[LeftOut]


def inspected(paths: Iterable[str | Path]) -> Found:
    """All that was inspected beneath some folders."""
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
            found.inspections.append((file.parent.name, value))
    return found


def _beneath(path: Path) -> Iterator[Path]:
    if path.name == TABLE:  # which stands for its folder
        path = path.parent
    for place, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if ATTENTION in names:
            yield Path(place) / ATTENTION


def _check_shapes(value: Inspection) -> None:
    for run in value["runs"]:
        for layer in run["layers"]:
            heads = len(layer["blocks"])
            if len({(len(block), len(line)) for block in layer["blocks"] for line in block}) > 1:
                raise ValueError(f"{run['name']}, {layer['layer']}: blocks must be rectangles of one shape")
            if any(values is not None and len(values) != heads for name, values in _figures(layer)):
                raise ValueError(f"{run['name']}, {layer['layer']}: figures must be of {heads} heads")


def _figures(layer: Layer) -> list[tuple[str, list[float] | None]]:
    many: Mapping[str, Any] = layer
    return [(name, many.get(name)) for name in FIGURES]


def drawn(inspections: Sequence[tuple[str, Inspection]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The values that the page's scripts read: each head's blocks as letters, a line of them for each query block.

    Args:
        labels: names of lines by the keys of the dashboard's runs.

    Returns:
        of each file its title and sizes, and runs: `key` in the dashboard or null, label, and layers, each with its
        name, its place (one for all attentions of a layer) and number, what its keys are, `maps`, [largest weight,
        lines] of each head, and figures.
    """
    return [
        {
            "title": f"{folder}: {' '.join(value['text'].split())[:60]}",
            "tokens": value["tokens"], "window": value["window"], "sinks": value["sinks"],
            "runs": [_run(run, labels) for run in value["runs"]],
        }
        for folder, value in inspections
    ]  # fmt: skip


def label_of(run: Seen, labels: Mapping[str, str]) -> str:
    """What a run is called: as in the dashboard where it is there."""
    return labels.get(run["id"] or "") or run["backend"] or run["name"]


def _run(run: Seen, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "key": run["id"] if run["id"] in labels else None, "label": label_of(run, labels), "name": run["name"],
        "layers": [
            {
                "name": layer["layer"], "place": layer["layer"].partition(": ")[0],
                "number": layer.get("number", place), "keys": layer.get("keys", "tokens"),
                "maps": [_shaded(block) for block in layer["blocks"]],
            }
            | {name: values and [float(f"{x:.{DIGITS}g}") for x in values] for name, values in _figures(layer)}
            for place, layer in enumerate(run["layers"])
        ],
    }  # fmt: skip


def _shaded(block: list[list[float]]) -> list[Any]:
    peak = max(map(max, block), default=0.0)
    root = [[(max(0.0, x) / (peak or 1.0)) ** 0.5 for x in line] for line in block]  # small weights are seen, too
    lines = ["".join(LETTERS[round((len(LETTERS) - 1) * x)] for x in line) for line in root]
    return [float(f"{peak:.{DIGITS}g}"), lines]
