"""From the options `attention` and `around` to layers: one word, or a list of mechanisms that is tiled over depth.

An entry of the list is the name of a backend, a mapping `{"name": ..., <options>}`, a `functools.partial` of an
attention class (what Hydra makes of conf/attention/*.yaml), or any callable that takes (dim, heads, causal, positions,
seed) by keyword and returns a layer.

A wrapper is no entry of a list: it stands around the whole stack, and the list in its option `inner`; or `around` lists
wrappers by themselves, from the outermost on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from attention_zoo import registry
from attention_zoo.contract import Attention, Layer, named, one_of
from attention_zoo.options import Seed, check_values
from attention_zoo.positions import ATTENTION_LEVEL, EMBEDDING_LEVEL
from attention_zoo.rules import shown

AUTO, USUAL = "auto", "sinusoidal"
POSITIONS = tuple(dict.fromkeys([*EMBEDDING_LEVEL, *ATTENTION_LEVEL, AUTO, "relative"]))
"""Every word that the option `positions` may be."""
SHARED = frozenset(inspect.signature(Attention).parameters)
"""Options that every mechanism has; a wrapper's are for the mechanisms inside."""


class Entry(NamedTuple):
    """One mechanism of the list.

    Fields:
        make: builds a layer from keywords.
        options: given with the entry; they win over the skeleton's.
        plain: what stands for the entry in a saved model's config; None if nothing could.
        cls: its class; None for another callable.
        inner: of a wrapper the mechanisms that it stands around; none if it was given a layer.
    """

    make: Callable[..., Layer]
    options: dict[str, Any]
    plain: dict[str, Any] | None
    cls: type[Attention] | None = None
    inner: Sequence[Entry] = ()

    @property
    def wraps(self) -> bool:
        return self.cls is not None and self.cls.wraps


class Mechanisms(NamedTuple):
    """What a stack is made of.

    Fields:
        wrappers: from the outermost on.
        listed: the mechanisms of the blocks.
        handed: options that a wrapper was given for the mechanisms inside.
    """

    wrappers: list[Entry]
    listed: Sequence[Entry]
    handed: dict[str, Any]


def entries(attention: Any, *, option: str = "attention") -> list[Entry]:
    """The list that `attention` says.

    Raises:
        ValueError: for an empty list, an unknown name, something that cannot be called, or a wrapper beside others.
    """
    many = attention if isinstance(attention, Sequence) and not isinstance(attention, str) else [attention]
    if not many:
        raise ValueError(f"{option} must name at least one mechanism, got an empty list")
    found = [_entry(one, option) for one in many]
    if len(found) > 1 and (wrapper := next((one.cls for one in found if one.wraps), None)):
        raise ValueError(
            f"{option} must list mechanisms of blocks, got {wrapper.name}, which stands around a whole stack: give it "
            f"the list, {{name: {wrapper.name}, inner: [...]}}, or name it in around"
        )
    return found


def _entry(one: Any, option: str) -> Entry:
    if isinstance(one, str):
        one = {"name": one}
    if isinstance(one, Mapping):
        options = {key: value for key, value in one.items() if key != "name"}
        if not isinstance(name := one.get("name"), str):
            raise ValueError(f"{option} as a mapping needs a name, got {shown(dict(one))}")
        cls, defaults = registry.recipe(name, option=option)  # an unknown name is refused here
        return _checked(Entry(partial(registry.build, name), options, dict(one), cls), defaults)
    if not callable(one):
        raise ValueError(f"{option} must be a name, a mapping, a callable or a list of these, got {shown(one)}")
    target, options = (one.func, dict(one.keywords)) if isinstance(one, partial) else (one, {})
    if isinstance(target, type) and issubclass(target, Attention):
        plain = {"name": target.name, **options} if _is_registered(target) else None
        return _checked(Entry(target, options, plain, target), {})
    return Entry(one, {}, None)


def _checked(entry: Entry, defaults: Mapping[str, Any]) -> Entry:
    for option in ("dim", "causal", "cross"):
        if option in entry.options:
            raise ValueError(f"{option} is the model's to say, not the mechanism's, got {shown(entry.options)}")
    if not entry.wraps:
        return entry
    assert entry.cls is not None
    known = {**registry.options_of_class(entry.cls), **defaults, **entry.options}
    inner = entry.cls.inside_of(known)  # type: ignore[attr-defined]  # a wrapper's
    if isinstance(inner, Layer):
        return entry._replace(plain=None)
    if inner is None:
        raise ValueError(f"inner must name the mechanism that {entry.cls.name} stands around, got None")
    inside = entries(inner, option="inner")
    plains = [each.plain for each in inside]
    plain = None if entry.plain is None or None in plains else {**entry.plain, "inner": plains}
    return entry._replace(plain=plain, inner=inside)


def _is_registered(cls: type[Attention]) -> bool:
    try:
        return registry.recipe(cls.name)[0] is cls
    except ValueError:
        return False


def mechanisms(attention: Any, around: Any = ()) -> Mechanisms:
    """What `around` and `attention` say: the wrappers of either, and what stands inside them all.

    Args:
        attention: see the module.
        around: a wrapper, or a list of wrappers from the outermost on.

    Raises:
        ValueError: as `entries`, and for what is no wrapper in `around`.
    """
    wrappers = outer(around)
    handed: dict[str, Any] = {}
    listed: Sequence[Entry] = entries(attention)
    while listed[0].wraps:
        (entry,) = listed
        handed |= {key: value for key, value in entry.options.items() if key in SHARED}
        wrappers.append(entry)
        if not entry.inner:
            raise ValueError(
                f"inner must say which mechanism the stack is made of, got {shown(entry.options['inner'])}"
            )
        listed = entry.inner
    return Mechanisms(wrappers, listed, handed)


def _spares(entry: Entry, options: Mapping[str, Any]) -> bool:
    """Whether a mechanism is free to leave the projections of global tokens out."""
    known = {} if entry.cls is None else registry.options_of_class(entry.cls)
    return "global_projections" in known and options.get("global_projections", "auto") == "auto"


def brings_global_tokens(wrappers: Sequence[Entry], listed: Sequence[Entry]) -> bool:
    """Whether a wrapper or a mechanism of the stack puts global tokens in."""
    around = any(getattr(entry.cls, "adds_global_tokens", False) for entry in wrappers)
    return around or any(entry.options.get("extra_global_tokens") for entry in listed)


def positions_of(positions: Any, listed: Sequence[Entry]) -> Any:
    """The position scheme of a model: one for all mechanisms, unless one has its own.

    "auto" is sinusoidal, and none where a mechanism of the stack has positions of its own (it declares "relative", as
    Transformer-XL does): with sinusoids on top of those, longer memories in evaluation lose what they bring (Dai et al.
    2019, table 6). Every other word is what was asked for, on top or not.
    """
    if positions != AUTO:
        return positions
    return "none" if any(has_own_positions(entry.cls) for entry in listed) else USUAL


def has_own_positions(cls: type[Attention] | None) -> bool:
    """Whether scores of this mechanism depend on distances by nature."""
    return cls is not None and "relative" in cls.declared.positions


def outer(around: Any) -> list[Entry]:
    """The wrappers that the option `around` says."""
    listed = isinstance(around, Sequence) and not isinstance(around, str)
    return [_wrapper(one) for one in (around if listed else [around])]


def _wrapper(one: Any) -> Entry:
    entry = _entry(one, "around")
    if not entry.wraps:
        known = " or ".join(registry.wrappers())
        raise ValueError(f"around must list wrappers, {known}, got {shown(one)}; attention says what stands inside")
    if given := (entry.options.keys() & {"inner", *SHARED}):
        raise ValueError(
            f"around must leave {' and '.join(sorted(given))} to attention, which says what stands inside, got "
            f"{shown(one)}"
        )
    plain = None if entry.plain is None else {key: value for key, value in entry.plain.items() if key != "inner"}
    return entry._replace(plain=plain)


def wrapped(stack: Layer, wrappers: Sequence[Entry], **shared: Any) -> Layer:
    """The stack with the wrappers around it; `shared` are dim, heads, causal and seed."""
    for entry in reversed(wrappers):
        own = {key: value for key, value in entry.options.items() if key not in SHARED}
        stack = entry.make(**{**own, **shared, "inner": stack})
    return stack


def layers(
    listed: Sequence[Entry],
    *,
    depth: int,
    positions: str | Mapping[str, Any],
    seed: int,
    handed: Mapping[str, Any],
    across: frozenset[int] = frozenset(),
    global_tokens: bool = True,
    **shared: Any,
) -> list[Layer]:
    """`depth` layers; layer i gets seed + i.

    Args:
        listed: see `entries`.
        positions: the model's word, or mapping. Embedding-level ones and "none" ask nothing of a mechanism: one whose
            scores are relative by nature stays so. The others are passed on.
        handed: options that a wrapper was given for all of them; an entry's own win.
        across: layers whose keys come from a source.
        global_tokens: whether some tokens will be global; False: weights that only those need are not built.
        shared: dim, heads, causal.

    Raises:
        Unsupported: where a mechanism cannot honour `positions` or an option.
        ValueError: for a word that is no scheme, or more mechanisms than layers.
    """
    name, _ = named("positions", positions)
    one_of(POSITIONS, positions=name)
    if len(listed) > depth:
        raise ValueError(f"depth must be at least the number of mechanisms listed, {len(listed)}, got {depth}")
    for entry in listed:
        check_values({"seed": Seed}, {**handed, **entry.options})  # before it is added to
    passed = "none" if name in EMBEDDING_LEVEL else positions
    made = []
    for index in range(depth):
        entry = listed[index % len(listed)]
        options = {**shared, "positions": passed, "seed": seed, **handed, **entry.options}
        if index in across:
            options["cross"] = True
        spared = not global_tokens and _spares(entry, options)
        if spared:
            options["global_projections"] = "shared"
        made.append(entry.make(**{**options, "seed": options["seed"] + index}))
        if spared:
            made[-1].spares_projections = True  # type: ignore[assignment]
    return made
