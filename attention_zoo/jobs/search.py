"""What a search may be told: everything that a training may, and what is the search's own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from attention_zoo.options import Natural, Positive, Text
from attention_zoo.rules import OneOf
from attention_zoo.schemas import store
from attention_zoo.settings import settings
from attention_zoo.training.config import TrainConfig
from attention_zoo.training.config import register as register_training


@dataclass
class SearchOptions:
    """conf/search.yaml, but for what it has of conf/train.yaml.

    Fields:
        space: field of a training -> its values; see `jobs.space`.
        trials: in all, those of earlier calls included.
        workers: trials at a time in this process; other processes may join by the same command.
        sampler: tpe | random: how values are drawn.
        sampler_seed: of what is drawn. `seed` is that of the trainings.
        pruner: median | halving | none: which trials are ended before their last step, by the main metric at their
            evaluations: those worse than half of the others, or all but the best quarter at each of fewer and fewer.
        storage: URL of the database; null: SQLite in the search's folder.
        heartbeat: seconds between a trial's signs of life; without one for three times as long it is taken over.
        retry: null | failed: try again the trials that failed or ran out of memory or time.
    """

    space: dict[str, Any] = field(default_factory=dict)
    trials: Positive = 20
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    sampler: Annotated[str, OneOf("tpe", "random")] = "tpe"
    sampler_seed: Natural = 0
    pruner: Annotated[str, OneOf("median", "halving", "none")] = "median"
    storage: Text | None = None
    heartbeat: Annotated[int, Field(ge=1, le=3600)] = 10
    retry: Annotated[str, OneOf("failed")] | None = None


@dataclass
class SearchConfig(SearchOptions, TrainConfig):
    """conf/search.yaml."""


OWN = tuple(each.name for each in fields(SearchOptions))


def register() -> None:
    """Make the schema known to Hydra, which conf/search.yaml names first, and all that a training's config needs."""
    register_training()
    store("search_schema", SearchConfig)


def options_of(composed: DictConfig) -> SearchOptions:
    """What is the search's own in a composed config, checked.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    if composed.force:
        raise ValueError("force is of single trainings; another sampler_seed or output begins another search")
    own: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, list(OWN)))
    merged: Any = OmegaConf.merge(OmegaConf.structured(SearchOptions), own)
    found: SearchOptions = settings(merged)
    return found


def words_of(overrides: list[str]) -> list[str]:
    """The words of a command that are each trial's, too."""
    return [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in OWN]
