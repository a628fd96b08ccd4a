"""Name -> class and default options. A backend is one yaml in conf/attention/ and the class that it targets.

A wrapper is a backend that stands around others (its option `inner`): every option `attention` takes its name too.

Third parties add theirs through the entry-point group `attention_zoo.backends`: each entry point names the backend and
loads either the class itself (its defaults are the constructor's) or a mapping in the form of our yaml.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata, resources
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from attention_zoo.contract import Abilities, Attention, Unsupported, catalogues

GROUP = "attention_zoo.backends"


def available() -> tuple[str, ...]:
    """Names of all backends that attend by themselves, shipped and third-party, sorted: what can be compared.

    A third-party one that cannot be used is warned of and left out: it must not stop the others. `recipe` says why.
    """
    return tuple(name for name in _usable() if not recipe(name)[0].wraps)


def wrappers() -> tuple[str, ...]:
    """Names of all backends that stand around others, as `available`."""
    return tuple(name for name in _usable() if recipe(name)[0].wraps)


def abilities() -> dict[str, Abilities]:
    """What each of `available()` declares."""
    return {name: recipe(name)[0].declared for name in available()}


catalogues.append(abilities)


def _usable() -> list[str]:
    return sorted([*_shipped(), *filter(_is_usable, _foreign())])


@cache
def _shipped() -> tuple[str, ...]:
    folder = resources.files("attention_zoo.conf").joinpath("attention")
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def read_shipped() -> None:
    """Have the recipes of all shipped backends at hand, which are otherwise read when they are first asked for."""
    for name in _shipped():
        _own(name)


@cache
def _own(name: str) -> tuple[type[Attention], dict[str, Any]]:
    """Read once: parsing the yaml takes longer than building the layer."""
    text = resources.files("attention_zoo.conf").joinpath("attention", f"{name}.yaml").read_text()
    return _split(OmegaConf.to_container(OmegaConf.create(text)), name)


def is_shipped(name: str) -> bool:
    """Whether a backend, or the one that a part belongs to, is this package's own."""
    return name.partition(".")[0] in _shipped()


def _foreign() -> dict[str, list[metadata.EntryPoint]]:
    """The entry points of other packages by name; one where a package is found twice."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in _points():
        same = found.setdefault(point.name, [])
        if point.value not in (other.value for other in same):
            same.append(point)
    for name in found.keys() & set(_shipped()):
        _left_out(f"backend {name!r} ({found.pop(name)[0].value}) has a name that attention_zoo has given away itself")
    return found


def _points() -> list[metadata.EntryPoint]:
    try:
        return list(metadata.entry_points(group=GROUP))
    except Exception:  # of one package's broken file: then package by package
        points: list[metadata.EntryPoint] = []
        for package in metadata.distributions():
            try:
                points += [point for point in package.entry_points if point.group == GROUP]
            except Exception as error:
                _left_out(f"the entry points of package {package.name} cannot be read: {type(error).__name__}: {error}")
        return points


def _is_usable(name: str) -> bool:
    try:
        _attempt(lambda: options_of(name), f"backend {name!r}")
    except ValueError as error:
        _left_out(str(error))
        return False
    return True


_told: dict[Any, Any] = {}


def _left_out(reason: str) -> None:
    """One line, once a process: the warning has no place in anybody's code."""
    warnings.warn_explicit(f"{reason}; left out", UserWarning, "attention_zoo", 0, registry=_told)


def recipe(name: str, *, option: str = "attention") -> tuple[type[Attention], dict[str, Any]]:
    """The class of a backend and its default options.

    Args:
        name: one of `available()` or `wrappers()`, or "backend.part": a layer that models of a backend mix in and that
            is none by itself, from the backend's `companions`.
        option: under which name it was asked for, for messages.

    Raises:
        ValueError: for an unknown name, listing the known ones and the nearest; or a third-party backend that cannot
            be used, saying why.
    """
    if name in _shipped():
        cls, defaults = _own(name)
        return cls, copy.deepcopy(defaults)
    foreign = _foreign()
    if points := foreign.get(name):
        values = ", ".join(point.value for point in points)
        if len(points) > 1:
            raise _Unfit(f"backend {name!r} is what several packages call theirs ({values}): uninstall all but one")
        return _attempt(lambda: _of_point(points[0], name), f"backend {name!r} ({values})")
    backend, _, part = name.partition(".")
    if part and (backend in _shipped() or backend in foreign):
        companions = recipe(backend)[0].companions
        if part in companions:
            return _attempt(lambda: (_checked(_named(companions[part]), name), {}), f"backend {name!r}")
    known = [*available(), *wrappers()]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{option} must be one of {', '.join(known)}, got {name!r}{hint}")


class _Unfit(ValueError):
    """A backend that cannot be used; says why."""


def _attempt(load: Callable[[], Any], what: str) -> Any:
    """What `load` gives. Other people's code may raise anything, and even end the process (`sys.exit`)."""
    try:
        return load()
    except (_Unfit, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise _Unfit(f"{what} cannot be loaded: {reason[:300]}") from error


def _of_point(point: metadata.EntryPoint, name: str) -> tuple[type[Attention], dict[str, Any]]:
    loaded = point.load()
    return _split(loaded, name) if isinstance(loaded, Mapping) else (_checked(loaded, name), {})


def _split(entry: Any, name: str) -> tuple[type[Attention], dict[str, Any]]:
    options = {key: value for key, value in entry.items() if key not in ("_target_", "_partial_")}
    return _checked(_named(entry["_target_"]), name), options


def _named(dotted: str) -> Any:
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _checked(found: Any, name: str) -> type[Attention]:
    if not (isinstance(found, type) and issubclass(found, Attention)):
        raise _Unfit(f"backend {name!r} must be a subclass of attention_zoo.contract.Attention, got {found!r}")
    if not isinstance(getattr(found, "name", None), str):
        raise _Unfit(f"backend {name!r} must say its name: {found.__qualname__} has no class attribute name")
    declared = getattr(found, "declared", None)
    if not isinstance(declared, Abilities):
        raise _Unfit(f"backend {name!r} must declare its Abilities as {found.__qualname__}.declared, got {declared!r}")
    for field, kind in get_type_hints(Abilities).items():
        value, words = getattr(declared, field), get_args(kind)
        if get_origin(kind) is Literal and value not in words:
            raise _Unfit(f"backend {name!r} must declare {field} as one of {', '.join(words)}, got {value!r}")
        if get_origin(kind) is tuple and not (
            isinstance(value, tuple) and all(isinstance(each, str) for each in value)
        ):
            raise _Unfit(f"backend {name!r} must declare {field} as a tuple of words, got {value!r}")
    return found


def options_of(name: str) -> dict[str, Any]:
    """Every option that `build(name)` takes, with its default; `inspect.Parameter.empty` where it must be given."""
    cls, defaults = recipe(name)
    return {**options_of_class(cls), **defaults}


def options_of_class(cls: type[Attention]) -> dict[str, Any]:
    """Every option of a mechanism's constructor, with its default; `inspect.Parameter.empty` where it must be given."""
    found: dict[str, Any] = {}
    for owner in (Attention, *reversed(cls.__mro__[: cls.__mro__.index(Attention)])):
        for key, parameter in inspect.signature(owner).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found[key] = parameter.default
    return found


def third_party() -> dict[str, dict[str, Any]]:
    """For each backend of another package what our yaml says of our own: target and own options with defaults.

    One that cannot be loaded is warned of and left out, as in `available`.
    """
    shared = inspect.signature(Attention).parameters
    found: dict[str, dict[str, Any]] = {}
    for name in filter(_is_usable, _foreign()):
        cls, _ = recipe(name)
        own = {key: value for key, value in options_of(name).items() if key not in shared}
        given = {key: value for key, value in own.items() if value is not inspect.Parameter.empty}
        found[name] = {"_target_": f"{cls.__module__}.{cls.__qualname__}", "_partial_": True, **given}
    return found


def build(name: str, *, dim: int, heads: int, causal: bool = True, **options: Any) -> Attention:
    """Build one attention layer.

        layer = build("longformer", dim=512, heads=8, causal=True, window=256)
        hidden = layer(x).hidden            # [B, L, 512]

    Args:
        name: one of `available()` or `wrappers()`: a wrapper stands around one layer then.
        dim: model width E.
        heads: number of heads H.
        causal: whether tokens see only the past.
        options: the mechanism's own; defaults are those of conf/attention/<name>.yaml.

    Raises:
        ValueError: for an unknown name or option, or a value outside its rule.
        Unsupported: for what the mechanism does not declare.
    """
    cls, defaults = recipe(name)
    known = options_of(name)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Unsupported(name, f"option {key}", f"it has no such option{hint}", ", ".join(sorted(known)))
    try:
        return cls(dim=dim, heads=heads, causal=causal, **{**defaults, **options})
    except SystemExit as error:  # of somebody else's: it must not end whoever asks
        raise ValueError(f"backend {name!r} cannot be built: it ends the process ({error})") from error
