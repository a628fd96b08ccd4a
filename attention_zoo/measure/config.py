"""What a benchmark may be told: the schema of conf/benchmark.yaml, and the cells that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from pydantic import Field

from attention_zoo import registry
from attention_zoo.contract import Unsupported
from attention_zoo.measure.cell import DTYPES, SpeedCell
from attention_zoo.measure.environment import resolved_device, usable_cores
from attention_zoo.measure.memory import default_limit
from attention_zoo.measure.peers.matches import Match, matches
from attention_zoo.measure.whole import build_model
from attention_zoo.measure.work import Variant
from attention_zoo.options import Heads, NonNegative, Positive, Seconds, Text, Threads, check_fields
from attention_zoo.rules import OneOf, shown
from attention_zoo.schemas import store

BASELINES = ("full/dense", "full/sdpa")
"""Full attention with its matrix materialised, and fused: everything is compared with both."""


@dataclass
class BenchmarkConfig:
    """conf/benchmark.yaml.

    Fields:
        backends: names, or name/kernel for one kernel of it; null takes every registered backend.
        baselines: whether both forms of full attention are always among them.
        options: backend -> its own options: 'options={longformer: {window: 128}}' or
            options.longformer.window=128; those of a mechanism that is not among the backends are of no use.
        lengths: tokens of each row.
        quadratic_up_to: no length above this for backends whose cost is quadratic; null lifts it.
        phases: forward | forward_backward | train_step | prefill | decode.
        variant: layer (projections included) | core (queries, keys and values given) | model (a whole one).
        models: of variant model, what each is besides its mechanism: a list of options of `Transformer`.
        causal: whether tokens see only the past.
        heads: attention heads.
        head_width: width of each; the model's is heads · head_width.
        batch: rows of a call.
        device: auto | cpu | cuda | cuda:1.
        dtype: float64 | float32 | bfloat16 | float16.
        threads: of torch; null takes all cores.
        repeats: timed calls of a cell, at most.
        budget_s: no further repeat once warm-up and repeats of a cell took this long.
        timeout_s: of a cell, process start included; null: as long as it takes.
        memory_limit_gib: of a cell; null takes nine tenths of what is free.
        force: measure finished cells again.
        retry: failed: measure again what failed, ran out of memory or timed out; null keeps such rows. A cell whose
            process was ended from outside is always measured again.
        dry: say how many cells there are and what they will take, and measure nothing.
        profile: write a Chrome trace of one call of each cell into <output>/traces.
        peers: run ours and its peers in turns instead of measuring cells; see `peers.contest`.
        against: these peers alone; null takes all.
        rounds: calls of each side, and ratios of each pair.
        peer_python: peer -> the Python of an environment that holds it, peer_python.hf_bigbird_4_57=/there/bin/python.
        budget: a memory, such as 8GiB: find the longest length that trains within it, besides the cells.
        tracker: which of conf/tracker hears of the cells, once they are measured, and of the report; null: none.
        output: folder of cells/, results.jsonl and results.csv.
    """

    backends: list[Text] | None = None
    baselines: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384])
    quadratic_up_to: Positive | None = 4096
    phases: list[str] = field(default_factory=lambda: ["forward_backward"])
    variant: Annotated[str, OneOf(*get_args(Variant))] = "layer"
    models: list[Any] = field(default_factory=list)
    causal: bool = True
    heads: Heads = 8
    head_width: Positive = 64
    batch: Positive = 1
    device: Text = "auto"
    dtype: Annotated[str, OneOf(*DTYPES)] = "float32"
    threads: Threads | None = None
    repeats: Positive = 5
    budget_s: NonNegative = 4.0
    timeout_s: Seconds | None = 120.0
    memory_limit_gib: Annotated[float, Field(gt=0, le=2**30, allow_inf_nan=False)] | None = None
    force: bool = False
    retry: Annotated[str, OneOf("failed")] | None = None
    dry: bool = False
    profile: bool = False
    peers: bool = False
    against: list[Text] | None = None
    rounds: Positive = 3
    peer_python: dict[str, str] = field(default_factory=dict)
    budget: Text | None = None
    tracker: Any = None
    output: Text = "runs/benchmark"

    def cells(self) -> list[SpeedCell]:
        """Every cell of the grid, shortest lengths first.

        Raises:
            ValueError: for an unknown backend, kernel, option or phase, or a value outside its rule, naming it.
                No cells at all are no error here: a comparison may be one of trainings alone.
        """
        check_fields(BenchmarkConfig, self)
        check_mappings("options", self.options)
        models = self._models()
        given = list(registry.available()) if self.backends is None else list(self.backends)
        named = [*BASELINES, *(each for each in given if each != "full")] if self.baselines else given
        _check_names(named)
        cells = [
            self._cell(*each.partition("/")[::2], length, phase, model)
            for length in sorted(self.lengths)
            for phase in self.phases
            for each in dict.fromkeys(named)
            for model in models
            if self._wanted(each.partition("/")[0], length)
        ]
        self._check_options(named, models)
        return cells

    @property
    def patience_s(self) -> float:
        """`timeout_s` as a number."""
        return math.inf if self.timeout_s is None else self.timeout_s

    def resolved_device(self) -> str:
        """The device that is meant; a ValueError for one that this machine lacks."""
        return resolved_device(self.device)

    def how(self) -> dict[str, Any]:
        """The keyword arguments of `cells.run_cells` besides cells and folder."""
        gib = self.memory_limit_gib
        return {
            "timeout_s": self.patience_s,
            "memory_limit_bytes": default_limit(self.resolved_device()) if gib is None else int(gib * 2**30),
            "repeats": self.repeats,
            "budget_s": self.budget_s,
            "force": self.force,
            "retry": self.retry,
            "profile": self.profile,
        }

    def matches(self) -> list[Match]:
        """Who meets whom, where peers take part.

        Raises:
            ValueError: as `cells`, and where nobody meets anybody.
        """
        check_fields(BenchmarkConfig, self)
        check_mappings("options", self.options)
        known = ("forward", "forward_backward", *(("train_step",) if self.variant == "model" else ()))
        phases = [phase for phase in self.phases if phase in known]
        if len(phases) < len(self.phases):
            raise ValueError(f"phases must be {' or '.join(known)} with peers=true, got {self.phases}")
        models = self._models()
        named = list(registry.available()) if self.backends is None else list(self.backends)
        _check_names(named)
        cells = [
            self._cell(*each.partition("/")[::2], length, phase, model)
            for length in sorted(self.lengths)
            for phase in phases
            for each in named
            for model in models
        ]
        self._check_options(named, models)
        found = matches(cells, against=self.against, quadratic_up_to=self.quadratic_up_to)
        if not found:
            raise ValueError("against and backends must leave a match, got none")
        return found

    def _wanted(self, backend: str, length: int) -> bool:
        quadratic = registry.recipe(backend)[0].declared.compute == "quadratic"
        return not quadratic or self.quadratic_up_to is None or length <= self.quadratic_up_to

    def _models(self) -> list[dict[str, Any]]:
        """Options of each model; of layers and cores there is one kind alone."""
        if self.variant != "model":
            if self.models:
                raise ValueError(f"models must be empty unless variant=model, got {shown(self.models)}")
            return [{}]
        for given in self.models:
            if not isinstance(given, Mapping):
                raise ValueError(f"models must list mappings of a model's options, got {shown(given)}")
        return [dict(given) for given in self.models] or [{}]

    def _cell(self, backend: str, kernel: str, length: int, phase: str, model: dict[str, Any]) -> SpeedCell:
        return SpeedCell(
            backend=backend,
            length=length,
            kernel=kernel or "auto",
            options=dict(self.options.get(backend) or {}),
            batch=self.batch,
            heads=self.heads,
            head_width=self.head_width,
            causal=self.causal,
            variant=self.variant,
            phase=phase,
            device=self.resolved_device(),
            dtype=self.dtype,
            threads=self.threads or usable_cores(),
            model=model,
        )

    def _check_options(self, named: Sequence[str], models: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what cannot be meant at once, instead of cell by cell."""
        backends = {each.partition("/")[0] for each in named}
        # those of a mechanism that is not measured this time wait for one that is: a preset lists all that it may meet
        for backend in sorted(self.options.keys() - backends - set(registry.available())):
            raise ValueError(f"options must be of a measured backend ({', '.join(sorted(backends))}), got {backend!r}")
        for backend in sorted(backends):
            options = self.options.get(backend) or {}
            known = options.keys() <= registry.options_of(backend).keys()
            if not options and not registry.is_shipped(backend):
                continue  # nothing is misspelt; what somebody else's backend raises is for its cells to say
            # An unknown name is a slip of the pen and raises; what a backend merely cannot do is a row that says so.
            with suppress(Unsupported) if known else nullcontext():
                layer = {"dim": self.heads * self.head_width, "heads": self.heads, "causal": self.causal, **options}
                registry.build(backend, **layer)
                _check_kernels(layer, [each for each in named if each.startswith(f"{backend}/")])
                for given in models if self.variant == "model" else ():
                    shared = {"dim": layer["dim"], "heads": self.heads, "causal": self.causal}
                    build_model(backend, options, given, **shared)


def _check_kernels(layer: dict[str, Any], named: Sequence[str]) -> None:
    """Refuse a kernel that a backend does not have; `layer` is what it can be built with.

    Args:
        named: backend/kernel.
    """
    for each in named:
        backend, _, kernel = each.partition("/")
        if kernel and "kernel" in registry.options_of(backend):
            try:
                registry.build(backend, **{**layer, "kernel": kernel})
            except ValueError as error:
                raise ValueError(f"backends must name kernels that there are, got {each!r}: {error}") from None


def check_mappings(key: str, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be options, by their key, for each backend that has some."""
    for backend, given in options.items():
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{key}.{backend} must be a mapping, got {shown(given)}")


def _check_names(named: Sequence[str]) -> None:
    """Refuse a backend that is not there."""
    for each in named:
        registry.recipe(each.partition("/")[0], option="backends")


def register() -> None:
    """Make the schema known to Hydra, which conf/benchmark.yaml names first."""
    store("benchmark_schema", BenchmarkConfig)
