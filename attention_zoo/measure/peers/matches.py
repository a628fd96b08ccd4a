"""Which of ours meets whom: the matches of a benchmark with `peers=true`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.peers.table import PEERS

BASELINES = ("sdpa", "materialised")
RIVALS: dict[str, tuple[str, ...]] = {
    "full": BASELINES,
    "longformer": ("hf_longformer", "local_attention", *BASELINES),
    "bigbird": ("hf_bigbird_4_57", "hf_bigbird", *BASELINES),
    "reformer": ("hf_reformer", "reformer_pytorch", *BASELINES),
    "transformer_xl": ("xl_dense", "sdpa"),
    "compressive": ("compressive_transformer_pytorch", "sdpa"),
    "memory_compressed": ("memory_compressed_attention", *BASELINES),
    "block_recurrent": ("block_recurrent_pytorch",),
}
"""A backend that is not listed, such as a third party's, meets the baselines."""
MODELS: dict[str, tuple[str, ...]] = {"full": ("hourglass_transformer",)}
"""Peers of whole models."""
TWO_SIDED_ONLY = ("hf_longformer", "hf_bigbird", "hf_bigbird_4_57")


@dataclass(frozen=True)
class Match:
    """One of ours at one length, and the peers that it meets there."""

    cell: SpeedCell
    rivals: tuple[str, ...]


def matches(
    cells: Iterable[SpeedCell], *, against: Iterable[str] | None = None, quadratic_up_to: int | None = None
) -> list[Match]:
    """The matches of some cells of ours, in both directions where there are peers for both.

    A cell says backend, length, options and the rest; its `causal` is replaced by what the backend and its peers can:

    - whole models as the cell says;
    - longformer two-sided, and causal with the window on one side (twice as long, unless the options give a window);
    - bigbird two-sided, as its peers, and h_transformer_1d, as longformer to which it is held; reformer and full
      causal; a third party's as its cell says;
    - block_recurrent as a layer, with one head of keys and without biases, unless the options say otherwise;
    - transformer_xl over one segment of 2048 and of 512, each with a memory of 512, whatever the cell's length: a long
      stream is the same segment again and again. With lengths of its own among the options: that one alone;
    - compressive with a segment and a memory of 512, unless the options give others.

    Args:
        against: these peers alone.
        quadratic_up_to: no full attention beyond this length.
    """
    wanted = None if against is None else set(against)
    if wanted is not None and not wanted <= PEERS.keys():
        unknown = ", ".join(sorted(wanted - PEERS.keys()))
        raise ValueError(f"against must name peers ({', '.join(PEERS)}), got {unknown}")
    found: dict[tuple[Any, ...], Match] = {}
    for cell in cells:
        for each in _directions(cell):
            rivals = tuple(
                name
                for name in _rivals(each)
                if (wanted is None or name in wanted)
                and not (each.causal and name in TWO_SIDED_ONLY)
                and (name not in BASELINES or quadratic_up_to is None or each.length <= quadratic_up_to)
            )
            if rivals:
                found[(*each.series(), each.length)] = Match(each, rivals)
    return list(found.values())


def _rivals(cell: SpeedCell) -> tuple[str, ...]:
    if cell.variant == "model":
        return MODELS.get(cell.backend, ())
    return RIVALS.get(cell.backend, BASELINES)


def _directions(cell: SpeedCell) -> list[SpeedCell]:
    if cell.variant == "model":
        return [cell]
    if cell.backend == "longformer":
        wide = {"window": 512, **cell.options}
        return [replace(cell, causal=False), replace(cell, causal=True, options=wide)]
    if cell.backend in ("bigbird", "h_transformer_1d"):
        return [replace(cell, causal=False)]
    if cell.backend == "block_recurrent":
        return [replace(cell, causal=True, variant="layer", options={"kv_heads": 1, "bias": False, **cell.options})]
    if cell.backend == "transformer_xl":
        default: dict[str, Any] = {"segment_length": 512, "memory_length": 512}
        given = {key: cell.options[key] for key in default if key in cell.options}
        pairs = [{**default, **given}]
        if not given:
            pairs.insert(0, {**default, "segment_length": 2048})
        found = [replace(cell, causal=True, length=p["segment_length"], options={**cell.options, **p}) for p in pairs]
        # an accelerator is not busy with one segment
        return [replace(cell, causal=True), *found] if cell.device.startswith("cuda") else found
    if cell.backend == "compressive":
        return [replace(cell, causal=True, options={"segment_length": 512, "memory_length": 512, **cell.options})]
    return [replace(cell, causal=True)] if cell.backend in ("reformer", "full") else [cell]


def heats(many: Iterable[Match]) -> list[list[Match]]:
    """Matches that can be run in turns: same length, same direction, so that a peer of several is timed once for all.

    Shortest first.
    """
    found: dict[tuple[int, bool], list[Match]] = {}
    for match in many:
        found.setdefault((match.cell.length, match.cell.causal), []).append(match)
    return [found[key] for key in sorted(found)]
