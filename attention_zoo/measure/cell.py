"""A cell: one backend at one length, doing one thing on one device. Its row: what that took.

`run_cell` measures in this process. Use `cells.run_cells`, which gives every cell a fresh one, for figures to publish.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

import torch

from attention_zoo import registry
from attention_zoo.contract import Attention, Unsupported, at_least, one_of
from attention_zoo.measure.environment import device_name, environment, usable_cores
from attention_zoo.measure.flops import LinearFlops, attention_flops, count_pairs
from attention_zoo.measure.identity import class_digest, identity
from attention_zoo.measure.memory import peak_memory, resident_bytes
from attention_zoo.measure.speed import matmul_rate, time_call
from attention_zoo.measure.work import Phase, Shape, Variant, Work, prepare
from attention_zoo.model.state import state_bytes

DTYPES = ("float64", "float32", "bfloat16", "float16")

FIGURES = (
    "seconds", "seconds_min", "seconds_max", "repeats", "warmup", "tokens_per_second", "peak_bytes", "reserved_bytes",
    "resident_bytes", "peak_method", "state_bytes", "flops", "matmul_flops_per_second", "floor_ratio",
)  # fmt: skip
"""What a measured row holds besides what describes its cell; all None where the cell did not finish."""


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
        variant, phase: see `work.prepare`.
        device: "cpu", "cuda" or "cuda:1".
        dtype: float64 | float32 | bfloat16 | float16, of parameters and inputs.
        threads: intra-op threads of torch; default all cores that this process may use.
    """

    backend: str
    length: int
    kernel: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    heads: int = 8
    head_width: int = 64
    causal: bool = True
    variant: str = "layer"
    phase: str = "forward_backward"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = field(default_factory=usable_cores)

    def __post_init__(self) -> None:
        at_least(
            1,
            length=self.length,
            batch=self.batch,
            heads=self.heads,
            head_width=self.head_width,
            threads=self.threads,
        )
        one_of(get_args(Variant), variant=self.variant)
        one_of(get_args(Phase), phase=self.phase)
        one_of(DTYPES, dtype=self.dtype)

    @property
    def dim(self) -> int:
        """Model width E."""
        return self.heads * self.head_width

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

    def build(self) -> Attention:
        """The layer, on the cell's device and in its dtype."""
        options = dict(self.options)
        if "kernel" in registry.options_of(self.backend):
            options.setdefault("kernel", self.kernel)
        elif self.kernel != "auto":
            raise Unsupported(self.backend, f"kernel={self.kernel}", "it has one kernel only", "kernel=auto")
        layer = registry.build(self.backend, dim=self.dim, heads=self.heads, causal=self.causal, **options)
        return layer.to(self.device, getattr(torch, self.dtype))


def blank_row(cell: SpeedCell, status: str, error: str | None = None) -> dict[str, Any]:
    """The row of a cell without figures: what describes it, and how it ended."""
    described = {
        each.name: getattr(cell, each.name) for each in fields(cell) if each.name not in ("backend", "options")
    }
    return {
        "kind": "speed",
        "id": cell.identity(),
        "backend": cell.backend,
        "status": status,
        "error": error,
        **described,
        "dim": cell.dim,
        **dict.fromkeys(FIGURES),
        "config": asdict(cell),
        "environment": {**environment(), "threads": cell.threads},
    }


def run_cell(cell: SpeedCell, *, repeats: int = 5, budget_s: float = 4.0) -> dict[str, Any]:
    """Measure a cell in this process: time first, then memory in a pass of its own, since observing slows the call.

    Args:
        repeats: timed calls at most.
        budget_s: no further repeat once warm-up and repeats have used this.

    Returns:
        The row, whose status is "ok", "oom", "unsupported" or "failed" (with the reason in one line).
    """
    torch.set_num_threads(cell.threads)
    try:
        figures = _measure(cell, repeats, budget_s)
    except Unsupported as error:
        return blank_row(cell, "unsupported", _line(error))
    except Exception as error:  # whatever a mechanism raises is this cell's result, not the end of the table
        return blank_row(cell, "oom" if ran_out_of_memory(error) else "failed", _named(error))
    return {**blank_row(cell, "ok"), **figures}


def _measure(cell: SpeedCell, repeats: int, budget_s: float) -> dict[str, Any]:
    torch.manual_seed(0)
    device, dtype = torch.device(cell.device), getattr(torch, cell.dtype)
    layer = cell.build()
    work = prepare(layer, Shape(cell.batch, cell.length, device, dtype), variant=cell.variant, phase=cell.phase)
    before = resident_bytes()
    linear = LinearFlops(layer)
    rate = matmul_rate(device=device, dtype=dtype)
    timing = time_call(work.run, device=device, repeats=repeats, budget_s=budget_s, before=work.before, first=linear)
    rate = max(rate, matmul_rate(device=device, dtype=dtype))
    after = resident_bytes()
    work.before()
    memory = peak_memory(work.run, device)
    flops = _flops(cell, layer, linear.flops)
    return {
        **asdict(timing),
        "tokens_per_second": cell.batch * work.tokens / timing.seconds,
        "peak_bytes": memory.peak_bytes,
        "peak_method": memory.method,
        "reserved_bytes": memory.reserved_bytes,
        "resident_bytes": after[1] - before[0] if before and after else None,
        "state_bytes": _state_bytes(work),
        "flops": flops,
        "matmul_flops_per_second": rate,
        "floor_ratio": timing.seconds * rate / flops if flops else None,
    }


def _flops(cell: SpeedCell, layer: Attention, linear: int) -> int | None:
    decode = cell.phase == "decode"
    pairs = count_pairs(layer, cell.length + decode, last_row_only=decode)
    if pairs is None:
        return None
    forward = linear + attention_flops(pairs, batch=cell.batch, heads=cell.heads, head_width=cell.head_width)
    return forward * (3 if cell.phase in ("forward_backward", "train_step") else 1)


def _state_bytes(work: Work) -> int | None:
    state = work.state()
    return None if state is None else state_bytes(state)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory was refused, by CUDA, by torch's CPU allocator or by the C++ library."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "bad_alloc", "out of memory")
    )


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException, most: int = 300) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else "no message"
