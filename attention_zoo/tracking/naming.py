"""What a followed run is called and how its config is laid out, so that hundreds can be told apart and filtered.

name     longformer-text-512-s0-window=128-3f2a1c
config   {"backend": "longformer", "task": "text", "seq_len": 512, "attention/window": 128, "optimizer/lr": 0.004}
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from attention_zoo import registry

LONGEST = 100
"""Characters of a name; W&B takes 128."""
DIGITS = 6
"""Of the identity, at the end of each name: what else differs makes another."""
UNSAID = ("_partial_", "_convert_", "tracker")
"""Keys of a config that say how it is built or followed, never what it is."""


def run_name(backend: str, *words: Any, identity: str, options: Mapping[str, Any] | None = None) -> str:
    """A name that no other run has: what it is of, the mechanism's options that are not its defaults, the identity.

    Args:
        backend: the mechanism's name in results.
        words: what else it is of, such as task, length and seed; None is left out.
        options: of the mechanism, its name among them.
    """
    parts = [backend, *(str(word) for word in words if word is not None), *differing(backend, options or {})]
    return f"{'-'.join(parts)[: LONGEST - DIGITS - 1]}-{identity[:DIGITS]}"


def differing(backend: str, options: Mapping[str, Any]) -> list[str]:
    """The options that are not the defaults of the mechanism, each as option=value.

    Args:
        backend: its name in results, where the options do not say whose they are by `name` or `_target_`.
    """
    name = str(options.get("name") or _name_of(options.get("_target_")) or backend)
    known = registry.recipe(name)[1] if name in (*registry.available(), *registry.wrappers()) else {}
    given = {key: value for key, value in options.items() if key != "name" and not key.startswith("_")}
    return [f"{key}={said(value)}" for key, value in given.items() if key not in known or known[key] != value]


def _name_of(target: Any) -> str | None:
    """The mechanism's name by its class; None where that cannot be had, which the run itself says."""
    try:
        return getattr(resolve_name(str(target)), "name", None)
    except Exception:  # an import runs other people's code
        return None


def said(value: Any) -> str:
    """A value in a name: {window: 3} for mappings, 1,2 for lists."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{said(each)}" for key, each in value.items()) + "}"
    return ",".join(map(said, value)) if isinstance(value, list | tuple) else str(value)


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values under keys such as attention/window: dashboards filter by these, and take no dots in them. What is
    null is left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in UNSAID or value is None:
            continue
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}/")
        else:
            found[f"{before}{key}"] = value
    return found
