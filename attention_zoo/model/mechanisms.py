"""From the option `attention` to layers: one word, or a list of mechanisms that is tiled over depth.

An entry of the list is the name of a backend, a mapping `{"name": ..., <options>}`, a `functools.partial` of an
attention class (what Hydra makes of conf/attention/*.yaml), or any callable that takes (dim, heads, causal, positions,
seed) by keyword and returns a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from attention_zoo import registry
from attention_zoo.contract import Attention, Layer, named, one_of
from attention_zoo.options import Seed, check_values
from attention_zoo.positions import ATTENTION_LEVEL, EMBEDDING_LEVEL
from attention_zoo.rules import shown

POSITIONS = tuple(dict.fromkeys([*EMBEDDING_LEVEL, *ATTENTION_LEVEL, "relative"]))
"""Every word that the option `positions` may be."""


class Entry(NamedTuple):
    """One mechanism of the list.

    Fields:
        make: builds a layer from keywords.
        options: given with the entry; they win over the skeleton's.
        plain: what stands for the entry in a saved model's config; None if nothing could.
    """

    make: Callable[..., Layer]
    options: dict[str, Any]
    plain: dict[str, Any] | None


def entries(attention: Any) -> list[Entry]:
    """The list that `attention` says.

    Raises:
        ValueError: for an empty list, an unknown name or something that cannot be called.
    """
    many = attention if isinstance(attention, Sequence) and not isinstance(attention, str) else [attention]
    if not many:
        raise ValueError("attention must name at least one mechanism, got an empty list")
    return [_entry(one) for one in many]


def _entry(one: Any) -> Entry:
    if isinstance(one, str):
        one = {"name": one}
    if isinstance(one, Mapping):
        options = {key: value for key, value in one.items() if key != "name"}
        if not isinstance(name := one.get("name"), str):
            raise ValueError(f"attention as a mapping needs a name, got {shown(dict(one))}")
        registry.recipe(name)  # an unknown name is refused here
        return _checked(Entry(partial(registry.build, name), options, dict(one)))
    if not callable(one):
        raise ValueError(f"attention must be a name, a mapping, a callable or a list of these, got {shown(one)}")
    cls, options = (one.func, dict(one.keywords)) if isinstance(one, partial) else (one, {})
    if isinstance(cls, type) and issubclass(cls, Attention):
        plain = {"name": cls.name, **options} if _is_registered(cls) else None
        return _checked(Entry(cls, options, plain))
    return Entry(one, {}, None)


def _checked(entry: Entry) -> Entry:
    for option in ("dim", "causal", "cross"):
        if option in entry.options:
            raise ValueError(f"{option} is the model's to say, not the mechanism's, got {shown(entry.options)}")
    return entry


def _is_registered(cls: type[Attention]) -> bool:
    try:
        return registry.recipe(cls.name)[0] is cls
    except ValueError:
        return False


def layers(attention: Any, *, depth: int, positions: str | Mapping[str, Any], seed: int, **shared: Any) -> list[Layer]:
    """`depth` layers; layer i gets seed + i.

    Args:
        attention: see the module.
        positions: the model's word, or mapping. Embedding-level ones and "none" ask nothing of a mechanism: one whose
            scores are relative by nature stays so. The others are passed on.
        shared: dim, heads, causal.

    Raises:
        Unsupported: where a mechanism cannot honour `positions` or an option.
        ValueError: for a word that is no scheme, or more mechanisms than layers.
    """
    name, _ = named("positions", positions)
    one_of(POSITIONS, positions=name)
    listed = entries(attention)
    if len(listed) > depth:
        raise ValueError(f"depth must be at least the number of mechanisms listed, {len(listed)}, got {depth}")
    for entry in listed:
        check_values({"seed": Seed}, entry.options)  # before it is added to
    passed = "none" if name in EMBEDDING_LEVEL else positions
    made = []
    for index in range(depth):
        entry = listed[index % len(listed)]
        options = {**shared, "positions": passed, "seed": seed, **entry.options}
        made.append(entry.make(**{**options, "seed": options["seed"] + index}))
    return made
