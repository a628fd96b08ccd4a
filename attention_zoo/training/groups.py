"""Schemas of the groups of a run's options that have no `_target_`: how it trains, what differs in each half, how it
writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.model.generate import COLDEST
from attention_zoo.options import Finite, Natural, Positive, Probability, SeedOfRun
from attention_zoo.rules import OneOf
from attention_zoo.training.precision import PRECISIONS
from attention_zoo.training.progress import KINDS

POSITIVE = "a positive number or null"


@dataclass
class TrainerConfig:
    """conf/trainer/*.yaml.

    Fields:
        precision: float32 | bfloat16 (autocast) | float16 (autocast and loss scaling, CUDA).
        accumulate: parts that a batch is split into, to save memory; divides batch.
        clip: largest norm of the gradient; null leaves it.
        carry_state: whether backends that keep a state carry it over consecutive segments of a document.
        eval_every: steps between evaluations.
        log_every: steps between logged figures.
        checkpoint_every: steps between checkpoints.
        patience: evaluations without a better main metric after which to stop; null never.
        stop_at: value of the main metric at which to stop; null never.
        max_seconds: time budget of training, evaluations included; null is none.
        progress: auto | bar | lines | none.
        ahead: batches that a process of its own draws ahead of the training, the same ones; 0: the training draws them.
    """

    precision: Annotated[str, OneOf(*PRECISIONS)] = "float32"
    accumulate: Positive = 1
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False, description=POSITIVE)] | None = 1.0
    carry_state: bool = True
    eval_every: Positive = 100
    log_every: Positive = 10
    checkpoint_every: Positive = 100
    patience: Positive | None = None
    stop_at: Finite | None = None
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False, description=POSITIVE)] | None = None
    progress: Annotated[str, OneOf(*KINDS)] = "auto"
    ahead: Annotated[int, Field(ge=0, le=1024)] = 0


@dataclass
class SideConfig:
    """One half of an encoder-decoder: what differs from the run's `attention` and `model`; null: nothing does.

    Fields:
        attention: a backend's name, or a mapping with its name and options.
        depth, heads, positions, norm, feed_forward, short_conv: see `Transformer`.
        output_dropout, reversible, around, shorten: see `Transformer`.
    """

    attention: Any = None
    depth: Positive | None = None
    heads: Positive | None = None
    positions: Any = None
    norm: Any = None
    feed_forward: Any = None
    short_conv: Any = None
    output_dropout: Probability | None = None
    reversible: Any = None
    around: Any = None
    shorten: Any = None


@dataclass
class DecodeConfig:
    """How an encoder-decoder writes when it is evaluated; see `generate`.

    Fields:
        greedy: take the likeliest token; false draws.
        beams: continuations that are kept at a time; 1: one.
        temperature, top_k, top_p, seed: of draws.
    """

    greedy: bool = True
    beams: Annotated[int, Field(ge=1, le=2**16)] = 1
    temperature: Annotated[float, Field(ge=COLDEST, le=1e300)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="a probability above 0")] = 1.0
    seed: SeedOfRun = 0
