"""A cell: one backend at one length, doing one thing on one device. Its row: what that took.

`run_cell` measures in this process. Use `cells.run_cells`, which gives every cell a fresh one, for figures to publish.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import torch

from attention_zoo import registry
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.ends import ending, one_line
from attention_zoo.measure.environment import canonical_device, device_name, environment, usable_cores
from attention_zoo.measure.flops import LinearFlops, attention_flops, count_pairs
from attention_zoo.measure.identity import class_digest, identity
from attention_zoo.measure.limit import limited
from attention_zoo.measure.memory import Memory, ResidentPeak, peak_memory
from attention_zoo.measure.speed import LONG_S, matmul_rate, time_call
from attention_zoo.measure.trace import write_trace
from attention_zoo.measure.whole import build_model, work_of
from attention_zoo.measure.work import Phase, Variant, Work, prepare
from attention_zoo.model.state import state_bytes
from attention_zoo.model.transformer import Transformer
from attention_zoo.options import Heads, Positive, Text, Threads, check_fields
from attention_zoo.results.row import Call, Figures, SpeedRow, Status, no_figures
from attention_zoo.rules import OneOf, shown

DTYPES = ("float64", "float32", "bfloat16", "float16")

UNOBSERVED = f"resident set: tensors of a call of over {LONG_S:g} s are not observed"
"""Method where `peak_bytes` is None and `resident_bytes` holds what was measured."""


@dataclass(frozen=True)
class SpeedCell:
    """What to measure.

    Fields:
        backend: one of `attention_zoo.available()`.
        length: tokens L; for phase "decode", tokens that the state has seen.
        kernel: one of the backend's kernels; "auto" takes the fastest.
        options: further options of the backend, e.g. {"window": 256}.
        batch, heads, head_width: B, H, D. The model width is H·D.
        causal: whether tokens see only the past.
        variant, phase: see `work.prepare`; model: the layer in a whole one, see `whole.work_of`.
        model: of variant model, options of `Transformer` besides the mechanism, such as {"depth": 6}.
        device: "cpu", "cuda" or "cuda:1".
        dtype: float64 | float32 | bfloat16 | float16, of parameters and inputs.
        threads: intra-op threads of torch; default all cores that this process may use.
    """

    backend: Text
    length: Positive
    kernel: Text = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    batch: Positive = 1
    heads: Heads = 8
    head_width: Positive = 64
    causal: bool = True
    variant: Annotated[str, OneOf(*get_args(Variant))] = "layer"
    phase: Annotated[str, OneOf(*get_args(Phase))] = "forward_backward"
    device: Text = "cpu"
    dtype: Annotated[str, OneOf(*DTYPES)] = "float32"
    threads: Threads = field(default_factory=usable_cores)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(type(self), self)
        object.__setattr__(self, "device", canonical_device(self.device))  # frozen: this is the one time
        if self.model and self.variant != "model":
            raise ValueError(f"model must be empty unless variant=model, got {shown(self.model)}")

    @property
    def dim(self) -> int:
        """Model width E."""
        return self.heads * self.head_width

    @property
    def said(self) -> str:
        """What is measured, in words: "full", "full/dense", "full (shorten=2@1 8@3 2@1)"."""
        kernel = "" if self.kernel == "auto" else f"/{self.kernel}"
        model = ", ".join(f"{key}={value}" for key, value in self.model.items())
        return f"{self.backend}{kernel}" + (f" ({model})" if model else "")

    def identity(self) -> str:
        """Name of this cell's result; see `identity.identity`.

        Raises:
            ValueError: for an unknown backend or a device that this machine lacks.
        """
        config = {**asdict(self), "foreign": class_digest(registry.recipe(self.backend)[0])}
        return identity(config, device=device_name(self.device), threads=self.threads)

    def series(self) -> tuple[Any, ...]:
        """Equal for cells that differ in length alone: they form one line in a chart."""
        return tuple(
            str(sorted(value.items())) if isinstance(value, dict) else value
            for value in (getattr(self, each.name) for each in fields(self) if each.name != "length")
        )

    def call(self) -> Call:
        """What rows say of it, but for backend and length."""
        return {
            "kernel": self.kernel,
            "batch": self.batch,
            "heads": self.heads,
            "head_width": self.head_width,
            "causal": self.causal,
            "variant": self.variant,
            "phase": self.phase,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "dim": self.dim,
        }

    def shape(self) -> Shape:
        """What its inputs look like."""
        return Shape(self.batch, self.length, torch.device(self.device), getattr(torch, self.dtype))

    def measured(self) -> Attention | Transformer:
        """What a call runs: the layer, or the model whose blocks attend by such layers."""
        if self.variant != "model":
            return self.build()
        shared = {"dim": self.dim, "heads": self.heads, "causal": self.causal}
        model = build_model(self.backend, self._options(), self.model, **shared)
        return model.to(self.device, getattr(torch, self.dtype))

    def build(self) -> Attention:
        """The layer, on the cell's device and in its dtype."""
        layer = registry.build(self.backend, dim=self.dim, heads=self.heads, causal=self.causal, **self._options())
        return layer.to(self.device, getattr(torch, self.dtype))

    def _options(self) -> dict[str, Any]:
        options = dict(self.options)
        if "kernel" in registry.options_of(self.backend):
            options.setdefault("kernel", self.kernel)
        elif self.kernel != "auto":
            raise Unsupported(self.backend, f"kernel={self.kernel}", "it has one kernel only", "kernel=auto")
        return options


def blank_row(cell: SpeedCell, status: Status, error: str | None = None) -> SpeedRow:
    """The row of a cell without figures: what describes it, and how it ended."""
    return {
        "kind": "speed",
        "id": cell.identity(),
        "backend": cell.backend,
        "status": status,
        "error": error,
        "length": cell.length,
        **cell.call(),
        **no_figures(),
        "config": asdict(cell),
        "environment": environment(cell.threads),
    }


def run_described(cell: dict[str, Any], **how: Any) -> SpeedRow:
    """`run_cell` of the cell with these fields: what a fresh process is asked for."""
    return run_cell(SpeedCell(**cell), **how)


def run_cell(
    cell: SpeedCell,
    *,
    repeats: int = 5,
    budget_s: float = 4.0,
    observe: bool = True,
    trace: str | None = None,
    memory_limit_bytes: int | None = None,
) -> SpeedRow:
    """Measure a cell in this process: time first, then memory in a pass of its own, since observing slows the call.

    Args:
        repeats: timed calls at most.
        budget_s: no further repeat once warm-up and repeats have used this.
        observe: whether the pass for memory is made.
        trace: a folder; one more call is profiled and written there as a Chrome trace, named by the cell.
        memory_limit_bytes: what it may take beyond the loaded libraries, inputs and parameters included.

    Returns:
        The row, whose status is "ok", "oom", "unsupported" or "failed" (with the reason in one line).
    """
    torch.set_num_threads(cell.threads)
    if cell.phase == "train_step":
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # what the first one imports is a library, no memory
    try:
        with limited(memory_limit_bytes, device=cell.device, threads=cell.threads):
            figures = _measure(cell, repeats, budget_s, observe, trace)
    except Unsupported as error:
        return blank_row(cell, "unsupported", one_line(error))
    except Exception as error:  # whatever a mechanism raises is this cell's result, not the end of the table
        return blank_row(cell, *ending(error))
    return {**blank_row(cell, "ok"), **figures}


def _measure(cell: SpeedCell, repeats: int, budget_s: float, observe: bool, trace: str | None) -> Figures:
    torch.manual_seed(0)
    device, dtype = torch.device(cell.device), getattr(torch, cell.dtype)
    layer = cell.measured()
    work = work_for(layer, cell)
    linear = LinearFlops(layer)
    rate = matmul_rate(device=device, dtype=dtype)
    resident = ResidentPeak()
    timing = time_call(work.run, device=device, repeats=repeats, budget_s=budget_s, before=work.before, first=linear)
    resident_bytes = resident.bytes()
    rate = (rate + matmul_rate(device=device, dtype=dtype)) / 2
    held = work.held_bytes()
    memory = _observed(work, device, timing.seconds) if observe else None
    flops, floor = analytic_flops(cell, layer, linear.flops, work.seen)
    return {
        "seconds": timing.seconds,
        "seconds_min": timing.seconds_min,
        "seconds_max": timing.seconds_max,
        "repeats": timing.repeats,
        "warmup": timing.warmup,
        "cpu_seconds": timing.cpu_seconds,
        "tokens_per_second": cell.batch * work.tokens / timing.seconds,
        "peak_bytes": memory.peak_bytes if memory else None,
        "peak_method": memory.method if memory else UNOBSERVED,
        "reserved_bytes": memory.reserved_bytes if memory else None,
        "resident_bytes": resident_bytes,
        "held_bytes": held,
        "state_bytes": _state_bytes(work),
        "flops": flops,
        "floor_flops": floor,
        "matmul_flops_per_second": rate,
        "floor_ratio": timing.seconds * rate / floor if floor else None,
        "trace": write_trace(work, Path(trace) / f"{cell.identity()}.json", device) if trace else None,
    }


def _observed(work: Work, device: torch.device, seconds: float) -> Memory | None:
    """The peak, but on a CPU not of a long call: the profiler would hold more than the call itself."""
    if device.type == "cpu" and seconds > LONG_S:
        return None
    work.before()
    return peak_memory(work.run, device)


def work_for(layer: Attention | Transformer, cell: SpeedCell) -> Work:
    """The call of a cell, given what it runs."""
    if isinstance(layer, Transformer):
        return work_of(layer, cell.shape(), cell.phase)
    return prepare(layer, cell.shape(), variant=cell.variant, phase=cell.phase)


def analytic_flops(
    cell: SpeedCell, layer: Attention | Transformer, linear: int, seen: int = 0
) -> tuple[int | None, int | None]:
    """FLOPs of one call by definition, and of the matrix products that no kernel of linear memory can do without.

    They differ in training alone: attention's backward must compute the scores again, so that it costs 2.5 forwards
    instead of 2. The time that the second would take at the measured matmul rate is the floor. None of a whole model:
    what its blocks see is not counted.

    Args:
        linear: FLOPs of the projections, forward.
        seen: tokens before those of the call.
    """
    if isinstance(layer, Transformer):
        return None, None
    before = cell.length if cell.phase == "decode" else seen
    new = 1 if cell.phase == "decode" else cell.length
    pairs = count_pairs(layer, before + new, last_row_only=cell.phase == "decode")
    if pairs is None:
        return None, None
    if seen:
        pairs -= count_pairs(layer, seen) or 0
    attention = attention_flops(pairs, batch=cell.batch, heads=cell.heads, head_width=cell.head_width)
    if cell.phase in ("forward_backward", "train_step"):
        return 3 * (linear + attention), 3 * linear + 7 * attention // 2
    return linear + attention, linear + attention


def _state_bytes(work: Work) -> int | None:
    state = work.state()
    return None if state is None else state_bytes(state)
