"""What has to differ between the backends of a comparison so that something else is equal.

| regime | equal for all | what differs, and follows from the reference (mostly `full`) |
|---|---|---|
| steps | steps, batches, sizes | nothing |
| flops | FLOPs of the whole training, by the definition (`measure.given`) | steps |
| seconds | time of the whole training, from timed steps (`jobs.steps`) | steps |
| parameters | their number, within 2 % | width of the feed-forward |
| keys | keys that a query sees, the mean over a row, within 10 % | options of the backend: `KNOBS` |

The reference itself stays as it is; full attention sees all keys in every regime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attention_zoo import registry
from attention_zoo.measure.given import flops_per_token, seen_by
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.transformer import Transformer
from attention_zoo.options import LARGEST
from attention_zoo.rules import named
from attention_zoo.training.building import build
from attention_zoo.training.config import check, options_of
from attention_zoo.training.models import mechanism_of, model_of, name_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.seed import contained

WITHIN = 0.02
"""Of parameters."""
NEAR = 0.10
"""Of keys: options are whole numbers."""
KNOBS: Mapping[str, Callable[[int], dict[str, int]]] = {
    "bigbird": lambda n: {"block": n},
    "block_recurrent": lambda n: {"window": n, "states": n},
    "compressive": lambda n: {"segment_length": n, "memory_length": n, "compressed_length": max(1, n // 2)},
    "h_transformer_1d": lambda n: {"block": 2 * n},
    "longformer": lambda n: {"window": n},
    "reformer": lambda n: {"chunk": n},
    "transformer_xl": lambda n: {"segment_length": n, "memory_length": n},
}
"""Backend -> the options, of one whole number, by which it is chosen how many keys a query sees; more with more.
adaptive_span has none: there training chooses."""


def changes(
    configs: Mapping[str, Mapping[str, Any]], regime: str, against: str, keys: float | None = None
) -> dict[str, Any]:
    """What each backend's config changes in a regime.

    Args:
        configs: one composed config of a training for each backend, by its name in the comparison.
        regime: "flops", "parameters" or "keys".
        against: the name of the reference.
        keys: that a query shall see, for regime "keys".

    Returns:
        {"changes": name -> values of conf/train.yaml, nested as there}, or {"error": why there is none}.
    """
    find = {"flops": _flops, "parameters": _parameters}.get(regime)
    with contained():
        try:
            if find is None:
                found = {name: _keys(config, keys) for name, config in configs.items() if name != against}
            else:
                found = find(configs, against)
            return {"changes": found}
        except (ValueError, NotImplementedError) as error:
            return {"error": " ".join(str(error).split())}


def _model(config: Mapping[str, Any], **changed: Any) -> Any:
    options = options_of(check({**config, "model": {**config["model"], **changed}}))
    task = build(options.task, "task")
    return model_of(options, mechanism_of(options), task, objective_of(task))


def _flops(configs: Mapping[str, Mapping[str, Any]], against: str) -> dict[str, Any]:
    found = {}
    for name, config in configs.items():
        model = _model(config)
        each = flops_per_token(model, config["seq_len"]) if isinstance(model, Transformer) else None
        if each is None:
            raise ValueError(f"regime=flops needs backends whose FLOPs are known, got {name}: leave it out")
        found[name] = each
    steps, reference = configs[against]["steps"], found[against]
    return {name: {"steps": max(1, round(steps * reference / each))} for name, each in found.items()}


def _parameters(configs: Mapping[str, Mapping[str, Any]], against: str) -> dict[str, Any]:
    wanted = parameter_count(_model(configs[against]))
    found = {}
    for name, config in configs.items():
        if name == against:
            continue
        kind, options = named("feed_forward", config["model"].get("feed_forward", "gelu"))
        if kind == "none":
            raise ValueError("regime=parameters chooses the width of the feed-forward, got model.feed_forward=none")

        def count(
            width: int,
            config: Mapping[str, Any] = config,
            plain: Mapping[str, Any] = {"name": kind, **options},
        ) -> int:
            return parameter_count(_model(config, feed_forward={**plain, "width": width}))

        one, more = count(64), count(128)
        width = 64 + round((wanted - one) / ((more - one) / 64))
        total = count(width) if width >= 1 else 0
        if abs(total / wanted - 1) > WITHIN:
            raise ValueError(
                f"regime=parameters: no width of the feed-forward brings {name} within {WITHIN:.0%} of the {wanted:,} "
                f"parameters of {against}, got {width} for {count(max(1, width)):,}"
            )
        found[name] = {"model": {"feed_forward": {"name": kind, **options, "width": width}}}
    return found


def _keys(config: Mapping[str, Any], keys: float | None) -> dict[str, Any]:
    """By bisection over the backend's whole number."""
    assert keys is not None
    options = options_of(check(config))
    backend, length = name_of(mechanism_of(options)), options.seq_len
    knob = KNOBS.get(backend)
    if knob is None:
        raise ValueError(
            f"regime=keys knows no options of {backend} by which keys can be chosen; it does of {', '.join(KNOBS)}"
        )
    asked = {key: value for key, value in config["attention"].items() if key not in ("_target_", "_partial_", "name")}
    causal = objective_of(build(options.task, "task")).causal

    def mean(number: int) -> float:
        chosen = {**asked, **knob(number)}
        shape = {"dim": config["model"]["dim"], "heads": config["model"]["heads"], "causal": causal}
        seen = seen_by(registry.build(backend, **shape, **chosen), length).keys
        assert seen is not None
        return float(seen.mean())

    low, high = 1, 1
    while mean(high) < keys and high < min(length, LARGEST):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) < keys else (low, middle)
    best = min((low, high), key=lambda number: abs(mean(number) - keys))
    if abs(mean(best) / keys - 1) > NEAR:
        raise ValueError(
            f"regime=keys: no options of {backend} let a query of {length} tokens see {keys:g} keys in the mean, "
            f"within {NEAR:.0%}; the nearest are {knob(best)}, with {mean(best):.1f}"
        )
    return {"attention": knob(best)}
