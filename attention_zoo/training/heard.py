"""Words of a command that no model would hear: each is refused with what stands in its place, and never ignored.

    task=reference model=encoder_decoder model.depth=4     encoder.depth=2 and decoder.depth=1 stand in its place

Only what was said counts. A default that changes nothing, such as the pooling of a model without a pooled head, is no
word of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

PAIR = "seq2seq"
"""The objective whose model has an encoder and a decoder."""
SIDES = ("encoder", "decoder")
OF_HEADS = {"pooling": ("classify", "masked_lm"), "tied": ("causal_lm", "masked_lm", PAIR)}
"""Options of a model that belong to some heads, and the objectives that bring one of these."""


def trained_for(task: Any) -> str | None:
    """The objective of a task's config; None where its class does not say one."""
    try:
        objective = getattr(resolve_name(str(task.get("_target_"))), "objective", None)
    except Exception:  # an import runs other people's code; `check` says what is wrong with it
        return None
    return objective if isinstance(objective, str) else None


def keys_of(values: Mapping[str, Any], before: str = "") -> list[str]:
    """The full keys of nested values: {model: {depth: 3}} says model.depth."""
    found = []
    for name, value in values.items():
        key = f"{before}{name}"
        found += keys_of(value, f"{key}.") if isinstance(value, Mapping) and value else [key]
    return found


def check_heard(config: Mapping[str, Any], said: Sequence[str]) -> None:
    """Refuse words that would change nothing.

    Args:
        config: of a training, as plain values.
        said: full keys of what was asked for.

    Raises:
        ValueError: naming the word, what stands in its place, and the one to say instead.
    """
    objective = trained_for(config["task"])
    if objective is None:
        return
    for key in said:
        group, _, rest = key.partition(".")
        option = rest.partition(".")[0]
        if group == "attention" and config.get("hybrid"):
            raise ValueError(f"{key} changes nothing: hybrid stands in the place of attention; leave one of them out")
        heads = OF_HEADS.get(option, ()) if group == "model" else ()
        if heads and objective not in heads:
            raise ValueError(
                f"{key} changes nothing: it is for tasks of objective {' or '.join(heads)}, got one of {objective}"
            )
    if objective == PAIR:
        _check_pair(config, said)


def _check_pair(config: Mapping[str, Any], said: Sequence[str]) -> None:
    """Refuse a word of the whole model that both halves have in their own way, or of a half that a file brings."""
    asked = [
        key for key in said if key.partition(".")[0] in ("attention", "hybrid", *SIDES) or key.startswith("model.")
    ]
    held = _held(config) if asked else ()
    of_file = f"that of init={config.get('init')}"
    for key in asked:
        group, *rest = key.split(".")
        if group in held:
            raise ValueError(f"{key} changes nothing: the {group} is {of_file}; leave it out")
        if group in SIDES:
            continue
        option = rest[0] if group == "model" else "attention"
        new = {side: (config.get(side) or {}).get(option) for side in SIDES if side not in held}
        if None in new.values():
            continue
        reasons = [f"the {side} is {of_file}" for side in held] + [f"{side}.{option}={new[side]}" for side in new]
        instead = f"give {' and '.join(f'{side}.{option}' for side in new)} instead" if new else "leave it out"
        raise ValueError(f"{key} changes nothing, since each half has its own: {', '.join(reasons)}; {instead}")


def _held(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The halves that a model file brings; none where it cannot be read, which the run says."""
    if not config.get("init"):
        return ()
    from attention_zoo.training.tuned import found_in, held_by

    try:
        return held_by(found_in(config["init"]))
    except ValueError:
        return ()
