"""What a comparison is asked for: its backends, what is measured, and on what they are trained alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from attention_zoo import registry
from attention_zoo.files import plain
from attention_zoo.jobs.following import followed
from attention_zoo.jobs.published import published_tables
from attention_zoo.jobs.rates import with_rates
from attention_zoo.jobs.trainings import Run
from attention_zoo.measure.config import BenchmarkConfig, check_mappings
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery
from attention_zoo.options import AboveZero, SeedOfRun, Text, check_fields
from attention_zoo.report.build import TITLE
from attention_zoo.results.regime import REGIMES
from attention_zoo.rules import OneOf, shown
from attention_zoo.settings import one_line
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.heard import check_heard, keys_of

Made = TypeVar("Made")
PATIENCE_S = 300.0
Steps = Mapping[str, int | Mapping[str, int]]
"""By plan: of all its backends, or by backend."""


@dataclass
class TrainingPlan:
    """One task on which every backend is trained.

    Fields:
        task: which of conf/task.
        model: which of conf/model.
        tracker: which of conf/tracker; null: that of the comparison.
        set: values of conf/train.yaml that differ, nested as there: {steps: 200, trainer: {max_seconds: 60}}.
        options: backend -> its own options; a backend without an entry keeps its defaults.
        seconds: how long all of its trainings may take together: every backend is then trained for the same number of
            steps, chosen from a few timed steps of each (`jobs.steps`). null: as many steps as `set` or the task says.
            Where `set` says steps, those stand: so a choice of another machine is repeated.
        regime: what is equal for all: steps | flops | seconds | parameters | keys; see `training.regimes`.
        against: the backend whose FLOPs or parameters the others get.
        keys: that a query shall see, for regime=keys: the mean over a row.
        rates: learning rates that each backend tries with the first seed; the best on validation is that of all seeds.
    """

    task: Text = "text"
    model: Text = "tiny"
    tracker: Text | None = None
    set: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a positive number or null")] | None = None
    regime: Annotated[str, OneOf(*REGIMES)] = "steps"
    against: Text = "full"
    keys: Annotated[float, Field(ge=1, allow_inf_nan=False, description="a number of at least 1 or null")] | None = None
    rates: list[AboveZero] | None = None

    def check(self, name: str) -> None:
        """Raise a ValueError for fields that do not go together, naming them.

        Args:
            name: of the plan.
        """
        if (self.regime == "keys") != (self.keys is not None):
            raise ValueError(f"trainings.{name}.keys belongs to regime=keys and to no other, got regime={self.regime}")
        if self.regime == "seconds" and (self.seconds is None or "steps" in self.set):
            raise ValueError(
                f"trainings.{name}.regime=seconds needs seconds, and steps that are chosen, got "
                f"seconds={self.seconds} and set.steps={self.set.get('steps')}"
            )
        if (self.rates is not None and len(set(self.rates)) != len(self.rates)) or self.rates == []:
            raise ValueError(f"trainings.{name}.rates must be different rates, one or more, got {self.rates}")

    @property
    def timed(self) -> bool:
        """Whether its steps are chosen from timed ones."""
        return self.seconds is not None and "steps" not in self.set


@dataclass
class Variant:
    """A backend under a name of its own, with options, or in a model, that are not its defaults. It is trained beside
    the others; layers are measured of backends alone.

    Fields:
        backend: which.
        options: its own options, over those that a plan gives it.
        set: values of conf/train.yaml that differ, as in `TrainingPlan`: {model: {shorten: "1@1 2@4 1@1"}}.
    """

    backend: Text
    options: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class CompareConfig:
    """conf/compare.yaml.

    Fields:
        backends: names of backends, or of `variants`; null takes every registered one.
        variants: name -> a backend that is trained under that name with options of its own.
        measure: the cells, as conf/benchmark.yaml; its backends and output are those of the comparison.
        trainings: name -> what to train on.
        seeds: each training is run with each; two or more allow a ranking.
        parallel: trainings at a time.
        retry: failed: do again what failed, ran out of memory or timed out; null keeps such rows. What was ended from
            outside is always done again.
        dry: say how many cells and trainings there are and what they will take, and run nothing.
        published: name -> a published table that the trainings stand beside; see `published_tables`.
        small: backend -> options at which a few dozen tokens show its pattern, for the pictures; default the class's.
        picture_length: tokens of the pictures.
        title: on top of the report.
        tracker: which of conf/tracker hears of every training, of the cells once they are measured, and of the report;
            null: none.
        output: folder of everything.
    """

    backends: list[Text] | None = None
    variants: dict[str, Any] = field(default_factory=dict)  # Variant
    measure: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainings: dict[str, Any] = field(default_factory=dict)  # TrainingPlan; untyped, so that a word may add one
    seeds: list[SeedOfRun] = field(default_factory=lambda: [0])
    parallel: Annotated[int, Field(ge=1, le=1024)] = 2
    retry: Annotated[str, OneOf("failed")] | None = None
    dry: bool = False
    published: dict[str, Any] = field(default_factory=dict)  # PublishedTable
    small: dict[str, Any] = field(default_factory=dict)
    picture_length: Annotated[int, Field(ge=1, le=4096)] = 96
    title: Text = TITLE
    tracker: Any = None
    output: Text = "runs/compare"

    def __post_init__(self) -> None:
        self.trainings = {
            str(name): _plan(TrainingPlan, f"trainings.{name}", plan, "{task: text, model: tiny}")
            for name, plan in self.trainings.items()
        }
        self.variants = {
            str(name): _plan(Variant, f"variants.{name}", given, "{backend: longformer, options: {window: 64}}")
            for name, given in self.variants.items()
        }

    def names(self) -> list[str]:
        """The backends and variants, each known.

        Raises:
            ValueError: for an unknown one, listing those that there are; or a variant that is called as a backend is.
        """
        for name, variant in self.variants.items():
            registry.recipe(variant.backend, option=f"variants.{name}.backend")
            if name in (*registry.available(), *registry.wrappers()):
                raise ValueError(f"variants must have names of their own, got {name}, which is a backend's")
        given = list(registry.available()) if self.backends is None else list(self.backends)
        for name in given:
            if name not in self.variants:
                registry.recipe(name, option="backends")
        return given

    def followed(self) -> dict[str, Any] | None:
        """The tracker, if anything is followed; a ValueError for one that cannot be."""
        return followed(self.tracker, Path(self.output))

    def measured(self) -> list[str]:
        """Those of `names` that are backends."""
        return [name for name in self.names() if name not in self.variants]

    def runs(self, steps: Steps | None = None, rates: Mapping[str, Mapping[str, float]] | None = None) -> list[Run]:
        """Every training, one backend after the other within a task, so that a task is complete early.

        Args:
            steps: of the plans whose number was chosen, by name.
            rates: of the plans that have several, by name: backend -> the chosen one; None: each is still the default.

        Raises:
            ValueError: for a wrong override or option, naming it.
        """
        return [run for runs in self.planned(steps, rates).values() for run in runs]

    def planned(
        self, steps: Steps | None = None, rates: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, list[Run]]:
        """The same by plan."""
        check_fields(CompareConfig, self)
        published_tables(self.published, self.names())
        found: dict[str, list[Run]] = {}
        _check_options("small", self.small, self.variants)
        for task, plan in self.trainings.items():
            _check_options(f"trainings.{task}.options", plan.options, self.variants)
            shared = _shared(task, plan)
            if plan.tracker is None and (tracker := self.followed()) is not None:
                shared["tracker"] = tracker
            plan.check(task)
            given_steps = (steps or {}).get(task)
            if isinstance(given_steps, int):
                shared["steps"] = given_steps
            shared["regime"] = plan.regime
            planned: list[tuple[str, dict[str, Any]]] = []
            for seed in self.seeds:
                for name in self.names():
                    variant = self.variants.get(name) or Variant(name)
                    given = [plan.options.get(each) or {} for each in dict.fromkeys((variant.backend, name))]
                    options = [registry.recipe(variant.backend)[1], given[0], variant.options, *given[1:]]
                    config = {
                        **_with(shared, variant.set, f"variants.{name}"),
                        "seed": seed,
                        "backend": name,
                        "attention": _built(variant.backend, {k: v for each in options for k, v in each.items()}),
                    }
                    check_heard(config, ["attention", *keys_of(plan.set), *keys_of(variant.set)])
                    if isinstance(given_steps, Mapping):
                        config["steps"] = given_steps[name]
                    planned.append((f"{task}-{name}-s{seed}", check(config)))
            runs = [Run(name, config) for name, config in _equalised(task, plan, planned)]
            best = (rates or {}).get(task)
            found[task] = with_rates(runs, plan.rates, best) if plan.rates and best else runs
        return found


def _equalised(
    task: str, plan: TrainingPlan, planned: Sequence[tuple[str, dict[str, Any]]]
) -> list[tuple[str, dict[str, Any]]]:
    """The configs with what the plan's regime changes."""
    if plan.regime in ("steps", "seconds") or not planned:
        return list(planned)
    configs = {config["backend"]: config for _, config in reversed(planned)}
    if plan.against not in configs and plan.regime != "keys":
        raise ValueError(
            f"trainings.{task}.against must be one of the backends that take part, {', '.join(configs)}, got "
            f"{plan.against}"
        )
    given = {"configs": configs, "regime": plan.regime, "against": plan.against, "keys": plan.keys}
    try:
        changed = _changes(json.dumps(plain(given), sort_keys=True))
    except ValueError as error:
        raise ValueError(f"trainings.{task}: {error}") from None
    found = []
    for name, config in planned:
        mine = changed.get(config["backend"], {})
        options = {**config["attention"], **mine["attention"]} if "attention" in mine else config["attention"]
        model = {**config["model"], **mine.get("model", {})}
        merged = {**config, "attention": options, "model": model, "steps": mine.get("steps", config["steps"])}
        found.append((name, check(merged)))
    return found


@cache
def _changes(given: str) -> dict[str, Any]:
    """In a process of its own: it builds other people's mechanisms."""
    with Nursery() as nursery:
        found = nursery.call("attention_zoo.training.regimes:changes", json.loads(given), timeout_s=PATIENCE_S)
    if isinstance(found, Ended):
        raise ValueError(f"what the regime changes cannot be found: {found.reason}")
    if "error" in found:
        raise ValueError(found["error"])
    return dict(found["changes"])


def _plan(kind: type[Made], name: str, given: Any, example: str) -> Made:
    """A plan or variant from a mapping; a key that it does not know is refused."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping such as {example}, got {shown(given)}")
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"{name}: {one_line(error) or error}") from None
    return cast(Made, made)


def _shared(name: str, plan: TrainingPlan) -> dict[str, Any]:
    """What the trainings of a plan have in common; a key that conf/train.yaml does not know is refused."""
    chosen = [f"task={plan.task}", f"model={plan.model}", f"tracker={plan.tracker or 'none'}", "trainer.progress=none"]
    return _with(compose_training(chosen), plan.set, f"trainings.{name}")


def _with(base: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A training's config with some values that differ."""
    known = OmegaConf.create(dict(base))
    OmegaConf.set_struct(known, True)
    OmegaConf.set_struct(known.evaluate_at, False)  # whose keys are names
    try:
        merged = OmegaConf.merge(known, values)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}.set: {one_line(error)}") from None
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _check_options(key: str, options: Mapping[str, Any], variants: Mapping[str, Any]) -> None:
    """Refuse options of what is no backend, and what cannot be options; a backend that takes no part may have some."""
    for name in options:
        if name not in variants:
            registry.recipe(name, option=f"a key of {key}")
    check_mappings(key, options)


def _built(name: str, options: dict[str, Any]) -> dict[str, Any]:
    # Through the registry rather than conf/attention, which third-party backends have no place in.
    for option in options:
        if option not in registry.options_of(name):
            raise ValueError(f"options of {name} must be among {', '.join(registry.options_of(name))}, got {option!r}")
    return {"name": name, **options}
