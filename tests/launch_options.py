"""Which options of a mechanism are counted with which values, found from its constructor; see test_launches.py."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import attention_zoo as zoo
from attention_zoo.registry import abilities, options_of, recipe
from attention_zoo.rules import OneOf

Options = dict[str, Any]
NOT_COUNTED = {
    "dim": "a size",
    "heads": "a size",
    "seed": "a number that the host draws with",
    "kernel": "auto is what is counted",
    "cross": "counted by itself, with a source",
}
"""Options that are no case, and why."""
VALUES: dict[str, list[Any]] = {
    "kv_heads": [2],
    "head_width": [8, 24],
    "scale": [-0.3, 0.0],
    # adaptive_span
    "limit": [40],
    "ramp": [7],
    "start": [5.0],
    "span_loss": [0.0],
    # bigbird, h_transformer_1d
    "block": [8, 24],
    "window_blocks": [1, 5],
    "random": [0],
    "extra_global_tokens": [2],
    # longformer, block_recurrent
    "window": [40],
    "sinks": [4],
    "dilation": [2, [1, 1, 2, 4], [1, 2, 3, 4]],
    "states": [20],
    "truncate": [1],
    # transformer_xl, compressive
    "segment_length": [64],
    "memory_length": [64, 0],
    "clamp_length": [20],
    "compressed_length": [32],
    "ratio": [2],
    "reconstruction": [0.0],
    # reformer
    "rounds": [1],
    "chunk": [32],
    "look_back": [2],
    "look_ahead": [1],
    "buckets": [8, [4, 4]],
    "key_norm_epsilon": [1e-6],
    "fill": [8],
    "split_above": [8],
    "hash_seed": [3],
}
"""Numbers, which no annotation lists; `compression` is one of memory_compressed alone."""
BEGIN: dict[str, list[Options]] = {
    "longformer": [
        {"window": 40},
        {"window": 40, "sinks": 4, "sink_positions": "cache", "positions": "rotary"},
        {"window": 40, "sinks": 4, "sink_positions": "cache", "positions": "alibi"},
    ],
    "block_recurrent": [{}, {"window": 40, "states": 20}],
    "transformer_xl": [{"segment_length": 64, "memory_length": 64}],
    "compressive": [{"segment_length": 64, "memory_length": 64}],
}
"""Options at which others are changed: at which 300 tokens straddle every border, or which need one another."""
ALONE = {
    "bias", "head_width", "scale", "limit", "ramp", "start", "span_loss", "window_blocks", "clamp_length", "ratio",
    "compressed_length", "memory_length", "rounds", "chunk", "look_back", "key_norm_epsilon", "fill", "split_above",
    "hash_seed", "states",
}  # fmt: skip
"""Options that change how much is computed, not how: counted by themselves."""
SCORES = "causal", "kv_heads", "positions", "sink_logit"
"""Options of which all combinations are counted; of the others that are not alone all pairs."""


def values_of(name: str) -> dict[str, list[Any]]:
    """Of each option the values besides its default that are counted.

    Raises:
        LookupError: for an option of which nothing is said.
    """
    can, words, found = abilities()[name], _words(name), {}
    for key, default in options_of(name).items():
        if key in NOT_COUNTED:
            continue
        if key == "positions":
            values: Any = can.positions
        elif key == "compression" and isinstance(default, int):
            values = [2]
        elif key in words:
            values = words[key]
        elif isinstance(default, bool):
            values = [not default]
        elif key in VALUES:
            values = VALUES[key]
        else:
            raise LookupError(f"option {key} of {name} is in no case: say its values in VALUES")
        found[key] = [value for value in values if value != default or type(value) is not type(default)]
    if not can.two_sided:
        del found["causal"]
    if not can.grouped_heads:
        del found["kv_heads"]
    return {key: values for key, values in found.items() if values}


def _words(name: str) -> dict[str, tuple[Any, ...]]:
    """Options that may be one of some words."""
    found = {}
    for owner in recipe(name)[0].__mro__:
        if "__init__" in owner.__dict__ and issubclass(owner, zoo.Attention):
            hints = get_type_hints(inspect.unwrap(owner.__init__), include_extras=True)
            for key, hint in hints.items():
                for rule in get_args(hint):
                    if isinstance(rule, OneOf):
                        found[key] = rule.allowed
    return found


def cases(name: str) -> Iterator[Options]:
    """Combinations of options that the mechanism can be built with, each once."""
    values, told = values_of(name), []
    both = list(itertools.combinations([key for key in values if key not in ALONE], 2))
    scores = [key for key in SCORES if key in values]
    for begin in BEGIN.get(name, [{}]):
        changes = [
            *({key: value} for key in values for value in values[key]),
            *({a: x, b: y} for a, b in both for x, y in itertools.product(values[a], values[b])),
            *(
                {key: value for key, value in zip(scores, some) if value is not None}
                for some in itertools.product(*([None, *values[key]] for key in scores))
            ),
        ]
        for change in changes:
            options = {**begin, **change}
            if options not in told and _is_built(name, options):
                told.append(options)
                yield options


def _is_built(name: str, options: Options) -> bool:
    """Whether the mechanism does not refuse them, as of those that need one another."""
    try:
        zoo.build(name, dim=64, heads=4, **options)
    except ValueError:
        return False
    return True
