"""The command `plan`: a page of what each mechanism would take at lengths that no one device holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console

from attention_zoo.advice.paper import BUSY, MOST_SECONDS, Cost, Device, Mechanism, Model, mechanisms, slower_by
from attention_zoo.advice.sources import rows_of
from attention_zoo.files import write_atomic
from attention_zoo.measure.budget import parse_bytes
from attention_zoo.options import Positive, Text, check_fields
from attention_zoo.overview import markdown
from attention_zoo.report import units
from attention_zoo.report.rows import FROM
from attention_zoo.rules import OneOf
from attention_zoo.schemas import store

HEAD = (
    "columns", "devices", "activations", "from others", "held in all", "sent a layer", "sent a step", "computing",
    "link", "busy", "a step", "breaks first",
)  # fmt: skip
ASSUMED: dict[str, tuple[Any, str]] = {
    "memory": ("80GB", "of an H100 SXM, by its data sheet"),
    "matmul": (3.5e14, "assumed: 70 % of the 494 TFLOP/s of dense TF32 in the H100 SXM's data sheet"),
    "link": (
        5e10, "assumed: 400 Gb/s of NDR InfiniBand a device, as in NVIDIA's DGX H100 data sheet, also between devices "
        "of one machine, whose NVLink is faster",
    ),
}  # fmt: skip
"""What a device is taken for until somebody says, and on whose word. No GPU of ours was measured."""
GIVEN = "given by whoever asked"
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Many = Annotated[list[Positive], Field(min_length=1)]


@dataclass
class PlanConfig:
    """conf/plan.yaml.

    Fields:
        lengths, devices: columns of a row, and how many devices share them: each with each.
        memory: of a device, such as 80GB.
        matmul: FLOPs a second of large matrix products on it.
        link: bytes a second that it sends to another.
        stated: where these three come from; stands on the page. null: what `ASSUMED` says of those that are its own.
        dim, heads, depth, vocab, rows: of the model, and of a batch.
        dtype: float32 | bfloat16, of weights and activations.
        backends: names; null: all.
        results: a path or a list of paths of rows; null: those that a clone holds.
        output: a file for the page; null: it is printed.
    """

    lengths: Many = field(default_factory=lambda: [2**20, 2**22, 2**24])
    devices: Many = field(default_factory=lambda: [8, 64, 512])
    memory: Any = ASSUMED["memory"][0]
    matmul: Rate = ASSUMED["matmul"][0]
    link: Rate = ASSUMED["link"][0]
    stated: Text | None = None
    dim: Positive = 512
    heads: Positive = 8
    depth: Positive = 12
    vocab: Positive = 256
    rows: Positive = 1
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    backends: Any = None
    results: Any = None
    output: Text | None = None


def register() -> None:
    """Make the schema known to Hydra, which conf/plan.yaml names first."""
    store("plan_schema", PlanConfig)


def plan(config: PlanConfig, console: Console | None = None) -> None:
    """Write the page, or print it.

    Raises:
        ValueError: for a wrong option, or no rows.
        OSError: naming the file that could not be written.
    """
    console = console or Console()
    check_fields(PlanConfig, config)
    text = "\n".join(page(config))
    if config.output is None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    write_atomic(config.output, text + "\n")
    console.print(f"wrote {config.output}", markup=False, soft_wrap=True)


def page(config: PlanConfig) -> Iterator[str]:
    """Lines of Markdown."""
    device = Device(_bytes(config.memory), config.matmul, config.link)
    model = Model(config.dim, config.heads, config.depth, config.vocab, config.rows)
    rows = rows_of(config.results)
    known = slower_by(rows)
    yield "# Long sequences on paper"
    yield ""
    yield (
        f"One sequence a row, {config.rows} rows, {config.depth} layers of width {config.dim}, {config.heads} heads, "
        f"{config.dtype}, causal, every mechanism at its default options, parallel.sequence = devices; AdamW, no "
        f"recomputing of blocks. Nothing here was run at these lengths. A device has {units.size(device.memory)}, "
        f"{device.matmul / 1e12:g} TFLOP/s in large matrix products, and sends {device.link / 1e9:g} GB/s: "
        f"{_sources(config)}."
    )
    yield ""
    yield (
        "Sent: by formula, exact against counted bytes but for BigBird's links and long states (attention_zoo/parallel/"
        "sequence/paper.py); a device's average. From others: what comes to the device that gets most, kept until "
        "backward. Activations: counted of calls at two lengths. In all: with weights, gradients, moments and logits. "
        "Computing: FLOPs at that rate, those of scores times how much longer the mechanism took than its FLOPs where "
        "it was measured. Busy: of that time, where states go from device to device. A step: computing by busy, and "
        "the link, which nothing hides here. Breaks first: the limit that is nearest, with its share: memory, the link "
        f"(as long as computing), waiting ({BUSY:.0%} idle), time ({MOST_SECONDS / 60:g} minutes a step); above 100 % "
        "it is broken."
    )
    for mechanism in mechanisms(model, getattr(torch, config.dtype), rows, _names(config.backends)):
        yield ""
        yield f"## {mechanism.name}"
        yield ""
        if (refused := mechanism.refused()) is not None:
            yield f"No way over several devices yet: {refused}. What one device would need:"
            yield ""
        yield _measured(mechanism, known)
        yield ""
        devices = config.devices if refused is None else [1]
        yield markdown(HEAD, list(lines(mechanism, config.lengths, devices, device)))


def _sources(config: PlanConfig) -> str:
    """Where the figures of a device come from."""
    if config.stated is not None:
        return config.stated
    said = [f"{name} {source if getattr(config, name) == own else GIVEN}" for name, (own, source) in ASSUMED.items()]
    return "; ".join([*said, "nothing of it was measured here"])


def lines(mechanism: Mechanism, lengths: Sequence[int], devices: Sequence[int], device: Device) -> Iterator[list[str]]:
    """A line for each length on each number of devices."""
    for length, count in product(lengths, devices):
        yield [f"{length:,}", f"{count}", *_cells(mechanism.at(length, count, device))]


def _cells(cost: Cost) -> list[str]:
    first, share = cost.breaks
    return [
        units.size(cost.kept), units.size(cost.travelling), units.size(cost.held), units.size(cost.sent_layer),
        units.size(cost.sent), units.seconds(cost.computing), units.seconds(cost.linking), f"{cost.busy:.0%}",
        units.seconds(cost.seconds), f"{first}, {share:.0%}",
    ]  # fmt: skip


def _measured(mechanism: Mechanism, known: Any) -> str:
    if mechanism.name not in known:
        return "Its core was not measured: computing is FLOPs at the stated rate, the least it can be."
    factor, row = known[mechanism.name]
    return (
        f"Scores {factor:.1f} times their FLOPs: {row['variant']} of {row['length']:,} tokens, kernel {row['kernel']}, "
        f"one CPU, row {row['id']} of {row.get(FROM)}."
    )


def _names(backends: Any) -> list[str] | None:
    if backends is None:
        return None
    return [backends] if isinstance(backends, str) else [str(name) for name in backends]


def _bytes(given: Any) -> float:
    try:
        return float(parse_bytes(str(given)))
    except ValueError:
        raise ValueError(f"memory must be a size such as 80GB or 512MiB, got {given!r}") from None
