"""The figures that this project set out to reach, and what the rows of a benchmark say about each.

Each figure is a floor, for the setting that it names and nothing else: core (or layer, where the name says so), forward
and backward (or a train step of a whole model), 8 heads of 64, batch 1. One is *open* where no row of that setting is
there, such as where no accelerator was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attention_zoo.measure.derived import growth_exponent
from attention_zoo.results.row import Row

CPU = {"device": "cpu", "dtype": "float32", "threads": 1}
CUDA = {"device": "cuda", "dtype": "bfloat16"}
SHARED = {"heads": 8, "head_width": 64, "batch": 1, "status": "ok"}
CORE = {"variant": "core", "phase": "forward_backward"}
LAYER = {"variant": "layer", "phase": "forward_backward"}
STEP = {"variant": "model", "phase": "train_step"}


@dataclass(frozen=True)
class Figure:
    """One goal.

    Fields:
        backend, against: in words.
        said: what is asked for, in words.
        measure: rows -> the figure; None where it is open.
        goal: what it must reach.
        at_most: whether the goal is an upper bound.
        of: the variant and phase of its rows.
    """

    backend: str
    against: str
    said: str
    measure: Callable[[list[Row]], float | None]
    goal: float
    at_most: bool = False
    of: Mapping[str, str] = field(default_factory=lambda: CORE)


@dataclass(frozen=True)
class Verdict:
    """A figure and how it stands."""

    figure: Figure
    value: float | None

    @property
    def state(self) -> str:
        """reached, missed or open."""
        if self.value is None:
            return "open"
        goal, value = self.figure.goal, self.value
        return "reached" if (value <= goal if self.figure.at_most else value >= goal) else "missed"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """How every figure stands, in the order of the table."""
    rows = list(rows)
    return [Verdict(each, each.measure([row for row in rows if _fits(row, {**SHARED, **each.of})])) for each in FIGURES]


def _fits(row: Row, setting: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in setting.items())


def _met(
    rows: list[Row], backend: str, peers: tuple[str, ...], setting: Row, options: Row, key: str, **more: Any
) -> float | None:
    """The smallest of a ratio over several peers; None unless each was met in that setting."""
    found = []
    for peer in peers:
        values = [
            row[key]
            for row in rows
            if row["kind"] == "peer"
            and (row["backend"], row["against"]) == (backend, peer)
            and _in(row, {**setting, **more}, options)
            and row.get(key) is not None
        ]
        if not values:
            return None
        found.append(values[-1])
    return min(found)


def _in(row: Row, setting: Row, options: Row) -> bool:
    own = row["config"]["options"]
    return all(str(row[key]).startswith(str(value)) for key, value in setting.items()) and all(
        own.get(key, default) == value for key, (value, default) in options.items()
    )


def _pair(
    backend: str, what: str, peers: tuple[str, ...], against: str, options: Row, *, length: int, causal: bool,
    faster: float | None, less: float | None = None, most: float | None = None, of: Row = CORE,
) -> list[Figure]:  # fmt: skip
    """The goals of one line of the table: time, and memory as so many times less or at most so many times its bytes."""

    def ratio(key: str) -> Callable[[list[Row]], float | None]:
        return lambda rows: _met(rows, backend, peers, CPU, options, key, length=length, causal=causal)

    def inverse(rows: list[Row]) -> float | None:
        found = ratio("memory_ratio")(rows)
        return None if found is None else 1 / found

    found = []
    if faster is not None:
        found.append(Figure(what, against, f"≥ {faster:g}× faster", ratio("time_ratio"), faster, of=of))
    if less is not None:
        found.append(Figure(what, against, f"≥ {less:g}× less memory", ratio("memory_ratio"), less, of=of))
    if most is not None:
        found.append(Figure(what, against, f"≤ {most:g}× its bytes", inverse, most, True, of))
    return found


def _floor(backend: str, what: str, options: Row, goal: float, *, length: int, causal: bool) -> Figure:
    def measure(rows: list[Row]) -> float | None:
        found = [
            row["floor_ratio"]
            for row in rows
            if row["backend"] == backend
            and row.get("floor_ratio")
            and _in(row, {**CPU, "length": length, "causal": causal}, options)
        ]
        return found[-1] if found else None

    return Figure(what, "matmul floor", f"≤ {goal:g}× the floor", measure, goal, True)


def _beside(backend: str, other: str, what: str, options: Row, goal: float, *, length: int, causal: bool) -> Figure:
    """The time of one of ours over that of another of ours; each met full attention in the same run."""

    def measure(rows: list[Row]) -> float | None:
        mine, theirs = (
            _met(rows, name, ("sdpa",), CPU, own, "time_ratio", length=length, causal=causal)
            for name, own in ((backend, {}), (other, options))
        )
        return theirs / mine if mine and theirs else None

    return Figure(backend, what, f"≤ {goal:g}× its time", measure, goal, True)


def _growth(backend: str, what: str, key: str, noun: str, goal: float) -> Figure:
    def measure(rows: list[Row]) -> float | None:
        points = {
            row["length"]: float(row[key])
            for row in rows
            if row["kind"] == "speed"
            and row["backend"] == backend
            and row["length"] in (4096, 16384, 65536)
            and not row["config"]["options"]
            and row.get(key)
            and _in(row, CPU, {})
        }
        return growth_exponent(points) if {4096, 65536} <= points.keys() else None

    return Figure(what, "itself, 4k to 64k", f"{noun} ~ length^≤{goal:g}", measure, goal, True)


def _short(backend: str) -> Figure:
    def measure(rows: list[Row]) -> float | None:
        found = [
            _met(rows, backend, ("sdpa",), CPU, {}, "time_ratio", length=length, causal=False)
            for length in (256, 512, 1024)
        ]
        return max(1 / each for each in found if each) if all(found) else None

    return Figure(backend, "SDPA, 256 to 1,024", "≤ 1.3× its time", measure, 1.3, True)


def _rate(backend: str, what: str, goal: float, causal: bool) -> Figure:
    """The share of fused full attention's own FLOP rate."""

    def measure(rows: list[Row]) -> float | None:
        shares = [
            row["time_ratio"] * row["floor_flops"] / _full_flops(row)
            for row in rows
            if row["kind"] == "peer"
            and (row["backend"], row["against"]) == (backend, "sdpa")
            and row.get("floor_flops")
            and row.get("time_ratio")
            and _in(row, {**CUDA, "length": 65536, "causal": causal}, {})
        ]
        return shares[-1] if shares else None

    return Figure(what, "SDPA's FLOP rate, 64k, CUDA, bfloat16", f"≥ {goal:.0%}", measure, goal)


def _full_flops(row: Row) -> float:
    length = row["length"]
    pairs = length * (length + 1) / 2 if row["causal"] else length * length
    return 3.5 * 4 * row["head_width"] * row["heads"] * row["batch"] * pairs


def _cuda(backend: str, peers: tuple[str, ...], against: str, causal: bool) -> Figure:
    def measure(rows: list[Row]) -> float | None:
        return _met(rows, backend, peers, CUDA, {}, "time_ratio", length=16384, causal=causal)

    return Figure(backend, f"{against}, 16k, CUDA, bfloat16", "≥ 5× faster", measure, 5.0)


WINDOW, CAUSAL_WINDOW = {"window": (256, 256)}, {"window": (512, 256)}
XL_2048 = {"segment_length": (2048, 512), "memory_length": (512, 512)}
XL_512 = {"segment_length": (512, 512), "memory_length": (512, 512)}
ROUNDS = {"rounds": (4, 4)}
MEMORIES = {"segment_length": (512, 256), "memory_length": (512, 256), "ratio": (4, 4)}
BLOCKS = {"block": (64, 64), "window_blocks": (3, 3), "random": (3, 3)}
LAYERS = ("block_recurrent", "memory_tokens")
"""Have no core: their projections belong to what goes from block to block."""
HOURGLASS = {"shorten": ("2@1 8@3 2@1", None)}
LONG: Row = {"length": 16384, "causal": False}
PAST: Row = {"length": 16384, "causal": True}

FIGURES: tuple[Figure, ...] = (
    *_pair("longformer", "longformer ±256", ("hf_longformer",), "HF Longformer", WINDOW, **LONG, faster=4, less=8),
    *_pair("longformer", "longformer causal 512", ("sdpa",), "causal SDPA", CAUSAL_WINDOW, **PAST, faster=7, most=1.3),
    *_pair("bigbird", "bigbird", ("hf_bigbird_4_57",), "HF BigBird 4.57", BLOCKS, **LONG, faster=3, less=8),
    *_pair("bigbird", "bigbird", ("hf_bigbird",), "HF BigBird 5.x", BLOCKS, **LONG, faster=8, less=40),
    *_pair("bigbird", "bigbird", ("sdpa",), "SDPA", BLOCKS, **LONG, faster=12, most=2),
    *_pair(
        "reformer", "reformer 4 rounds", ("hf_reformer", "reformer_pytorch"), "best of HF and reformer-pytorch",
        ROUNDS, **PAST, faster=2.5, less=5,
    ),
    *_pair("reformer", "reformer 4 rounds", ("sdpa",), "causal SDPA", ROUNDS, **PAST, faster=3),
    *_pair(
        "transformer_xl", "transformer_xl 2048 + 512", ("xl_dense",), "original dense formulation", XL_2048,
        length=2048, causal=True, faster=2.5, less=5,
    ),
    *_pair(
        "transformer_xl", "transformer_xl 512 + 512", ("xl_dense",), "original dense formulation", XL_512,
        length=512, causal=True, faster=1.1, less=5,
    ),
    *_pair(
        "compressive", "compressive 512 + 512", ("compressive_transformer_pytorch",), "compressive-transformer-pytorch",
        MEMORIES, **PAST, faster=2, less=3,
    ),
    *_pair(
        "memory_compressed", "memory_compressed", ("memory_compressed_attention",), "memory-compressed-attention",
        {"compression": (3, 3)}, **PAST, faster=2, less=4,
    ),
    *_pair(
        "block_recurrent", "block_recurrent, layer", ("block_recurrent_pytorch",),
        "block-recurrent-transformer-pytorch",
        {"window": (512, 512), "states": (512, 512), "kv_heads": (1, None)}, **PAST, faster=2, of=LAYER,
    ),
    _beside("h_transformer_1d", "longformer", "longformer ±256", WINDOW, 3.5, **LONG),  # log2(length) / 4
    *_pair(
        "full", "hourglass, a train step", ("hourglass_transformer",), "hourglass-transformer-pytorch", HOURGLASS,
        length=4096, causal=True, faster=1, of=STEP,
    ),
    _floor("longformer", "longformer ±256", WINDOW, 2, **LONG),
    _floor("bigbird", "bigbird", BLOCKS, 2, **LONG),
    _floor("transformer_xl", "transformer_xl 2048 + 512", XL_2048, 3, length=2048, causal=True),
    *(
        replace(_growth(name, name, key, noun, goal), of=LAYER if name in LAYERS else CORE)
        for name in (
            "longformer", "bigbird", "reformer", "transformer_xl", "adaptive_span", "block_recurrent", "compressive",
            "memory_tokens", "h_transformer_1d",
        )
        for key, noun, goal in (
            ("seconds", "time", 1.3 if name in ("reformer", "h_transformer_1d") else 1.2),
            ("peak_bytes", "bytes", 1.05),
        )
    ),
    _short("longformer"),
    _short("bigbird"),
    _rate("longformer", "longformer ±256", 0.5, False),
    _rate("bigbird", "bigbird", 0.5, False),
    _rate("reformer", "reformer 4 rounds", 0.3, True),
    _rate("transformer_xl", "transformer_xl 512 + 512", 0.3, True),
    _cuda("longformer", ("hf_longformer",), "HF Longformer", False),
    _cuda("bigbird", ("hf_bigbird",), "HF BigBird 5.x", False),
    _cuda("reformer", ("hf_reformer",), "HF Reformer", True),
)  # fmt: skip
"""In the order of the table; those of an accelerator last."""
